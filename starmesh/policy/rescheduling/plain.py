"""Frozen dataclasses as plain JSON values and back, strictly by their annotations.

Owns the mapping: an object for a dataclass or a mapping of strings, an array for a tuple, a sorted array for a
frozenset of strings, its value for an enum. The sequences of a load are most of what there is: they are rows without
names. Numbers come back exactly: JSON as Python writes it has as many digits as a float needs. Owns no file format
(``record``).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache
from operator import attrgetter
from typing import Any, NoReturn, TypeVar

from starmesh.types import SequenceLoad

T = TypeVar("T")

_Reader = Callable[[object, str], Any]
_ROW_FIELDS = tuple(field.name for field in dataclasses.fields(SequenceLoad))
_row_of = attrgetter(*_ROW_FIELDS)


class NotPlain(ValueError):
    """A value does not fit the type that it is to be. The message names its place."""


def to_plain(value: object) -> object:
    """``value`` as JSON has it; what is plain already, and what has no plain form, as it is."""
    if isinstance(value, SequenceLoad):
        return list(_row_of(value))
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: to_plain(item) for name, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], value: object, where: str) -> T:
    """A ``kind`` again. Raises NotPlain, naming the place after ``where``, for anything that is not exactly one."""
    hint: Any = kind
    found: T = _reader(hint)(value, where)
    return found


@cache
def _reader(hint: Any) -> _Reader:
    """Reads values of one annotation. Raises TypeError for an annotation that has no plain form."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and len(arguments) == 2 and arguments[1] is type(None):
        return _optional(_reader(arguments[0]))
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        return _array(_reader(arguments[0]), tuple)
    if origin is Sequence:
        return _array(_reader(arguments[0]), tuple)
    if origin is frozenset:
        return _array(_reader(arguments[0]), frozenset)
    if origin is Mapping and arguments[0] is str:
        return _mapping(_reader(arguments[1]))
    if hint in _SCALARS:
        return _SCALARS[hint]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _member(hint)
    if hint is SequenceLoad:
        return _row(hint)
    if dataclasses.is_dataclass(hint):
        return _object(hint)
    raise TypeError(f"{hint} has no plain form")


def _integer(value: object, where: str) -> int:
    return value if type(value) is int else _refuse(where, "is not an integer")


def _number(value: object, where: str) -> float:
    # An integer stays one: written as it was, it is written the same again.
    if type(value) is float and math.isfinite(value):
        return value
    return value if type(value) is int else _refuse(where, "is not a finite number")


def _text(value: object, where: str) -> str:
    return value if isinstance(value, str) else _refuse(where, "is not a string")


def _truth(value: object, where: str) -> bool:
    return value if isinstance(value, bool) else _refuse(where, "is not true or false")


_SCALARS: Mapping[Any, _Reader] = {int: _integer, float: _number, str: _text, bool: _truth}


def _optional(read: _Reader) -> _Reader:
    return lambda value, where: None if value is None else read(value, where)


def _array(read: _Reader, collect: Callable[[Any], Any]) -> _Reader:
    def read_array(value: object, where: str) -> Any:
        if not isinstance(value, list):
            _refuse(where, "is not an array")
        return collect(read(item, f"{where}[{place}]") for place, item in enumerate(value))

    return read_array


def _mapping(read: _Reader) -> _Reader:
    def read_mapping(value: object, where: str) -> Any:
        if not isinstance(value, dict):
            _refuse(where, "is not an object")
        return {name: read(item, f"{where}.{name}"[:160]) for name, item in value.items()}

    return read_mapping


def _member(kind: type[Enum]) -> _Reader:
    def read_member(value: object, where: str) -> Enum:
        try:
            return kind(value)
        except ValueError:
            _refuse(where, f"is no {kind.__name__}")

    return read_member


def _object(kind: Any) -> _Reader:
    hints = typing.get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in dataclasses.fields(kind)}

    def read_object(value: object, where: str) -> Any:
        if not isinstance(value, dict):
            _refuse(where, "is not an object")
        for name in value.keys() ^ readers.keys():
            _refuse(f"{where}.{name}"[:160], "is unknown" if name in value else "is missing")
        fields = {name: read(value[name], f"{where}.{name}") for name, read in readers.items()}
        try:
            return kind(**fields)
        except ValueError as error:
            _refuse(where, f"cannot be: {error}")

    return read_object


def _row(kind: Any) -> _Reader:
    hints = typing.get_type_hints(kind)
    readers = [_reader(hints[name]) for name in _ROW_FIELDS]

    def read_row(value: object, where: str) -> Any:
        if not isinstance(value, list) or len(value) != len(readers):
            _refuse(where, f"is not a row of {len(readers)}")
        return kind(*(read(item, where) for read, item in zip(readers, value, strict=True)))

    return read_row


def _refuse(where: str, why: str) -> NoReturn:
    raise NotPlain(f"{where} {why}")
