"""The file of API keys: what a key is, how its line reads, and making a new one.

Owns the format and nothing of what keys allow at run time (``api_keys``). The file is JSON Lines, one key a line, with
comment lines that begin with ``#``; a key itself is in no file of the server's, only its SHA-256:

    {"key_id": "alice", "sha256": "9f86d0...", "scopes": ["generate"], "requests_per_s": 5, "max_requests": 8}

A file without any line is refused, comments count: a reader that comes while an editor has just emptied the file does
not take it for one that revokes every key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

KEY_PREFIX = "sm-"
KEY_BYTES = 32
MAX_FILE_BYTES = 1 << 20
MAX_KEYS = 4096
MAX_LIMIT = 1_000_000
"""The highest rate and the highest number of requests in flight that a key may be given."""
MIN_RATE = 1e-6
"""The lowest rate: a request in twelve days. A refused caller is told when to come again, and protobuf's Duration ends
after 10,000 years."""

_KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIELDS = frozenset({"key_id", "sha256", "scopes", "requests_per_s", "max_requests", "expires"})
_HEADER = "# API keys of starmesh, hashed. `starmesh keys create|list|revoke` edit it; routers follow it."


class Scope(StrEnum):
    """What a key may be used for."""

    GENERATE = "generate"
    """InferenceService and the HTTP API."""
    OPERATE = "operate"
    """ClusterService and the live page."""


class KeyFileError(ValueError):
    """A file of keys that cannot be used. The message names file and line, and holds nothing of a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key, without its secret. ``sha256`` in lower-case hex; None is no limit, or no end."""

    key_id: str
    sha256: str
    scopes: frozenset[Scope]
    requests_per_s: float | None = None
    max_requests: int | None = None
    expires: datetime | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a key that no file may hold."""
        if not _KEY_ID.fullmatch(self.key_id):
            raise ValueError("key_id: 1 to 64 letters, digits, dots, dashes and underscores are wanted")
        if not _DIGEST.fullmatch(self.sha256):
            raise ValueError("sha256: 64 hexadecimal digits in lower case are wanted")
        if not self.scopes:
            raise ValueError(f"scopes: at least one of {', '.join(Scope)} is wanted")
        if self.requests_per_s is not None and not MIN_RATE <= self.requests_per_s <= MAX_LIMIT:
            raise ValueError(f"requests_per_s: {MIN_RATE} to {MAX_LIMIT} is wanted")
        if self.max_requests is not None and not 0 < self.max_requests <= MAX_LIMIT:
            raise ValueError(f"max_requests: 1 to {MAX_LIMIT} is wanted")
        if self.expires is not None and self.expires.tzinfo is None:
            raise ValueError("expires: a time zone is wanted, as in 2030-01-31T00:00:00Z")


def new_secret() -> str:
    """A key as its holder gets it: ``sm-`` and 32 random bytes in base64url."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest_of(secret: str) -> str:
    """What the file holds of a key.

    A plain SHA-256: slow, salted hashes make guessing dear where people choose the password. A key is 256 random bits,
    so nobody guesses it however fast they hash, and a router can afford to hash at every call.
    """
    return hashlib.sha256(secret.encode()).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of the file, in its order. Raises KeyFileError for one that cannot be read or understood."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise KeyFileError(f"{path}: is larger than {MAX_FILE_BYTES} bytes; is it a file of API keys?")
        lines = content.decode().splitlines()
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; make it with `starmesh keys create {path}`") from None
    except UnicodeDecodeError:
        raise KeyFileError(f"{path}: is not text; is it a file of API keys?") from None
    if not lines:
        raise KeyFileError(f"{path}: is empty; make a key with `starmesh keys create {path}`")
    keys: dict[str, ApiKey] = {}
    digests: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            key = _key_of(line)
        except ValueError as error:
            raise KeyFileError(f"{path}, line {number}: {error}") from None
        if key.key_id in keys or key.sha256 in digests:
            raise KeyFileError(f"{path}, line {number}: the key {key.key_id} is there twice; remove one of them")
        keys[key.key_id] = key
        digests.add(key.sha256)
    if len(keys) > MAX_KEYS:
        raise KeyFileError(f"{path}: holds {len(keys)} keys; {MAX_KEYS} are the most")
    return tuple(keys.values())


def write_keys(path: Path, keys: tuple[ApiKey, ...]) -> None:
    """Replace the file in one step, so that a reader sees the old one or the new one. A new file is readable by its
    owner and group; one that was there keeps its mode. Raises OSError."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o640
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [_HEADER, *(json.dumps(_document(key)) for key in keys)]
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.chmod(mode)
    temporary.replace(path)


def _key_of(line: str) -> ApiKey:
    """The key of a line. Raises ValueError, which repeats no value: a person may have pasted the secret itself."""
    try:
        document = json.loads(line, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("is not JSON (nested too deeply)") from None
    if not isinstance(document, dict):
        raise ValueError('is not a JSON object; a line reads {"key_id": ..., "sha256": ..., "scopes": [...]}')
    if unknown := document.keys() - _FIELDS:
        raise ValueError(f"{len(unknown)} field(s) unknown; known are {', '.join(sorted(_FIELDS))}")
    for name in ("key_id", "sha256"):
        if not isinstance(document.get(name), str):
            raise ValueError(f"{name}: a string is wanted")
    scopes = document.get("scopes")
    if not isinstance(scopes, list) or any(scope not in list(Scope) for scope in scopes):
        raise ValueError(f"scopes: a list of {', '.join(Scope)} is wanted")
    return ApiKey(
        key_id=document["key_id"],
        sha256=document["sha256"],
        scopes=frozenset(map(Scope, scopes)),
        requests_per_s=_number(document, "requests_per_s"),
        max_requests=_whole(document, "max_requests"),
        expires=_time(document, "expires"),
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a field is there twice")
    return document


def _refuse_constant(_: str) -> float:
    raise ValueError("NaN and Infinity are no numbers here")


def _number(document: dict[str, Any], name: str) -> float | None:
    value = document.get(name)
    if value is None:
        return None
    # Also what Python would call a number: true is 1.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: a number is wanted")
    # What is out of range stays so, and fits a float.
    return float(max(-1, min(value, MAX_LIMIT + 1)))


def _whole(document: dict[str, Any], name: str) -> int | None:
    value = document.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{name}: a whole number is wanted")
    return value


def _time(document: dict[str, Any], name: str) -> datetime | None:
    value = document.get(name)
    if value is None:
        return None
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: a time is wanted, as in 2030-01-31T00:00:00Z") from None


def _document(key: ApiKey) -> dict[str, Any]:
    document: dict[str, Any] = {"key_id": key.key_id, "sha256": key.sha256, "scopes": sorted(key.scopes)}
    if key.requests_per_s is not None:
        document["requests_per_s"] = key.requests_per_s
    if key.max_requests is not None:
        document["max_requests"] = key.max_requests
    if key.expires is not None:
        document["expires"] = key.expires.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return document
