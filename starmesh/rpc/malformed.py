"""Requests that are not valid protobuf: says which field is wrong instead of failing as INTERNAL.

grpc answers a request that its deserializer rejects with INTERNAL and no field. Here the deserializer returns a
``Malformed`` value instead, which the status interceptor turns into INVALID_ARGUMENT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

_LENGTH_DELIMITED = 2
_MAX_DEPTH = 16


class Malformed(Exception):
    """A request that does not parse. ``field`` is its path, empty when the wire format itself is broken."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


def tolerant_deserializer(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Wrap a generated ``FromString``: malformed bytes give a Malformed value instead of an exception."""
    message_type = getattr(deserialize, "__self__", None)

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            descriptor = getattr(message_type, "DESCRIPTOR", None)
            field = _bad_string_field(data, descriptor, _MAX_DEPTH) if descriptor is not None else None
            if field is not None:
                return Malformed(field, "is not valid UTF-8; send UTF-8 text")
            return Malformed("", "the request is not a valid protobuf message of this method")

    return parse


def _bad_string_field(data: bytes, descriptor: Descriptor, depth: int) -> str | None:
    """The path of the first string field that is not UTF-8; None when there is none to be found."""
    if depth == 0:
        return None
    envelope: Message = Empty()
    try:
        envelope.ParseFromString(data)
    except DecodeError:
        return None
    for unknown in UnknownFieldSet(envelope):  # type: ignore[attr-defined] # the stubs miss __iter__
        field = descriptor.fields_by_number.get(unknown.field_number)
        if field is None or unknown.wire_type != _LENGTH_DELIMITED:
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                unknown.data.decode("utf-8")
            except UnicodeDecodeError:
                return str(field.name)
        elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            inner = _bad_string_field(unknown.data, field.message_type, depth - 1)
            if inner is not None:
                return f"{field.name}.{inner}"
    return None
