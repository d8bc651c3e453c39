"""Request bodies: read within bounds of size, time and memory, and parsed into a model.

Owns what may be read at all. The bounds hold while reading: nothing beyond them is ever kept.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final, TypeVar

import grpc
from fastapi import Request
from pydantic import BaseModel, ValidationError

from services.router.http.errors import from_validation, invalid
from services.router.validation import MAX_TEXT_BYTES
from starmesh.rpc.status import retry_later

MAX_BODY_BYTES: Final = 2 * MAX_TEXT_BYTES
"""The longest text that the router takes, with room for JSON's escapes and the fields around it; as much as gRPC takes
in a message."""
MAX_BODY_S: Final = 30.0
"""Seconds that a body may take to arrive: 8 MiB at 2.2 Mbit/s."""
MAX_HELD_BYTES: Final = 256 * 1024 * 1024
"""Bodies on their way in, of all requests together."""
MAX_VALUES: Final = 262_144
"""JSON values in a body: building more of them would hold the event loop for more than some 0.2 s."""
_RETRY_DELAY_S: Final = 1.0
# Matches from any quote, also where the string never ends: a search that could fail at each of them would be quadratic.
_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)

Model = TypeVar("Model", bound=BaseModel)


class BodyReader:
    """Reads the bodies of one server."""

    def __init__(self, *, max_held_bytes: int = MAX_HELD_BYTES, max_body_s: float = MAX_BODY_S) -> None:
        self._max_held_bytes = max_held_bytes
        self._max_body_s = max_body_s
        self.held_bytes = 0
        """Bytes of bodies that have not come to their end."""

    async def read(self, request: Request, model: type[Model]) -> Model:
        """The body as a ``model``. Raises RequestRefused, or StatusError when all memory for bodies is taken."""
        _check_headers(request)
        data = await self._read(request)
        _check_values(data)
        try:
            return model.model_validate_json(data)
        except ValidationError as error:
            raise from_validation(error) from None

    async def _read(self, request: Request) -> bytes:
        data = bytearray()
        try:
            async with asyncio.timeout(self._max_body_s):
                async for chunk in request.stream():
                    if len(data) + len(chunk) > MAX_BODY_BYTES:
                        raise _too_large()
                    if self.held_bytes + len(chunk) > self._max_held_bytes:
                        message = "this router has all the requests that it can read at once; try again later"
                        raise retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, message, _RETRY_DELAY_S)
                    self.held_bytes += len(chunk)
                    data += chunk
        except TimeoutError:
            raise invalid(
                None, f"the body has not come within {self._max_body_s:g} s", "body_timeout", status=408
            ) from None
        finally:
            self.held_bytes -= len(data)
        return bytes(data)


def _check_headers(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Also a guard: a web page of another origin may post plain text or a form to us without asking, but not JSON.
    if media_type != "application/json":
        raise invalid(None, "send the header content-type: application/json", "unsupported_media_type", status=415)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise invalid(None, "send the body uncompressed", "unsupported_content_encoding", status=415)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length[:20]) > MAX_BODY_BYTES:
        raise _too_large()


def _check_values(data: bytes) -> None:
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        # Perhaps they are within strings, as in a long table.
        bare = _STRING.sub(b"", data)
        if bare.count(b",") + bare.count(b"[") + bare.count(b"{") > MAX_VALUES:
            raise invalid(None, f"the body has more than {MAX_VALUES} values; send fewer, or text", "too_many_values")


def _too_large() -> Exception:
    return invalid(None, f"the body is longer than {MAX_BODY_BYTES} bytes", "body_too_large", status=413)
