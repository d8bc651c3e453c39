"""Profiles as TOML files, and those that ship beside this module by name.

Owns the format: the fields of ``Profile`` under their own names, those of its parts in tables; the name is the file's,
without ``.toml``. A key that is missing, unknown or of another type is an error, so that a slip of the pen is none of
the numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final, TypeVar

from starmesh.policy.cost import CostModel
from starmesh.profiles.profile import Link, Profile, ProfileError
from starmesh.types import KvLayout

SUFFIX: Final = ".toml"
_DIRECTORY: Final = Path(__file__).parent
_TABLES: Final = {"cost": CostModel, "layout": KvLayout, "link": Link}
_PLAIN: Final = ("total_blocks", "max_sequences", "max_step_tokens", "max_sequence_tokens", "step_noise")
# Annotations are strings, by ``from __future__ import annotations``.
_TYPES: Final[Mapping[str, type]] = {"int": int, "float": float, "str": str}

Part = TypeVar("Part", CostModel, KvLayout, Link)


def profile_names() -> tuple[str, ...]:
    """The profiles that ship with starmesh."""
    return tuple(sorted(path.stem for path in _DIRECTORY.glob(f"*{SUFFIX}")))


def load_profile(name_or_path: str | Path) -> Profile:
    """A shipped profile by its name, or that of a file. Raises ProfileError."""
    if name_or_path in profile_names():
        return read_profile(_DIRECTORY / f"{name_or_path}{SUFFIX}")
    path = Path(name_or_path)
    if path.suffix == SUFFIX or path.is_file():
        return read_profile(path)
    raise ProfileError(f"there is no profile {str(name_or_path)!r}: {_instead()}")


def read_profile(path: Path) -> Profile:
    """The profile in a file. Raises ProfileError, which names the file and the key."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"cannot read the profile {path}: {error.strerror}; {_instead()}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} is not TOML: {error}; mend it there, or {_instead()}") from error
    try:
        return _parse(content, path.name.removesuffix(SUFFIX))
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from error


def _instead() -> str:
    return f"use one of {', '.join(profile_names())}, or a {SUFFIX} file that `starmesh profile` has written"


def write_profile(profile: Profile, path: Path) -> None:
    """Write ``profile`` in one step; read again it is the same, if the file has its name. Raises OSError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text("\n".join(_lines(profile)) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def number_names() -> tuple[str, ...]:
    """The keys of a profile's numbers, as ``Profile.provenance`` names them."""
    inner = [
        f"{table}.{field.name}"
        for table, part in _TABLES.items()
        for field in dataclasses.fields(part)
        if field.type != "str"
    ]
    return (*_PLAIN, *inner)


def _parse(content: dict[str, Any], name: str) -> Profile:
    fields = [field for field in dataclasses.fields(Profile) if field.name in _PLAIN]
    plain = _values(content, fields, "", beside={*_TABLES, "provenance"})
    provenance = _table(content, "provenance") if "provenance" in content else {}
    for key, text in provenance.items():
        if key != "profile" and key not in number_names():
            raise ValueError(f"provenance.{key} is of no number; use one of {', '.join(number_names())}, or profile")
        if not isinstance(text, str):
            raise ValueError(f"provenance.{key} must be a text, not {text!r}")
    return Profile(
        name=name,
        cost=_part(content, "cost", CostModel),
        layout=_part(content, "layout", KvLayout),
        link=_part(content, "link", Link),
        provenance=provenance,
        **plain,
    )


def _part(content: dict[str, Any], name: str, part: type[Part]) -> Part:
    return part(**_values(_table(content, name), dataclasses.fields(part), f"{name}."))


def _table(content: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(content.get(name), dict):
        raise ValueError(f"needs a table [{name}]")
    table: dict[str, Any] = content[name]
    return table


def _values(
    table: dict[str, Any],
    fields: Sequence[dataclasses.Field[Any]],
    prefix: str,
    *,
    beside: Set[str] = frozenset(),
) -> dict[str, Any]:
    known = {field.name for field in fields}
    unknown = sorted(table.keys() - known - beside)
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]} is unknown; here are {', '.join(sorted(known | beside))}")
    values = {}
    for field in fields:
        if field.name not in table:
            raise ValueError(f"{prefix}{field.name} is missing")
        values[field.name] = _value(table[field.name], _TYPES[str(field.type)], prefix + field.name)
    return values


def _value(value: object, kind: type, key: str) -> int | float | str:
    if kind is float and type(value) in (int, float):
        number = float(value)  # type: ignore[arg-type]
        if not math.isfinite(number):
            raise ValueError(f"{key} must be finite, not {number}")
        return number
    # Not isinstance: a bool is an int to Python.
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", str: "a text"}
        raise ValueError(f"{key} must be {words[kind]}, not {value!r}")
    return value  # type: ignore[return-value]


def _lines(profile: Profile) -> Iterator[str]:
    for name in _PLAIN:
        yield f"{name} = {_toml(getattr(profile, name))}"
    for name, part in _TABLES.items():
        yield ""
        yield f"[{name}]"
        for field in dataclasses.fields(part):
            yield f"{field.name} = {_toml(getattr(getattr(profile, name), field.name))}"
    if profile.provenance:
        yield ""
        yield "[provenance]"
        for key, text in profile.provenance.items():
            yield f"{_toml(key) if '.' in key else key} = {_toml(text)}"


def _toml(value: float | str) -> str:
    if isinstance(value, str):
        # TOML's basic strings escape as JSON's do, and DEL besides.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    # numpy's floats are floats, but say so.
    return repr(float(value)) if isinstance(value, float) else repr(value)
