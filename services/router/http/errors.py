"""Failures in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` and the HTTP status that fits.

Owns the mapping from StatusError, from what pydantic finds and from HTTP's own errors, and the headers that come with
them. No message repeats what the client has sent.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from google.rpc import error_details_pb2
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from starmesh.rpc.status import StatusError

log = logging.getLogger(__name__)

_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"
# 499 is nginx's "client closed request": HTTP has no status for a request that was cancelled.
_KINDS: Final[dict[grpc.StatusCode, tuple[int, str, str]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, _INVALID, "invalid_value"),
    grpc.StatusCode.FAILED_PRECONDITION: (400, _INVALID, "failed_precondition"),
    grpc.StatusCode.OUT_OF_RANGE: (400, _INVALID, "out_of_range"),
    grpc.StatusCode.UNAUTHENTICATED: (401, _INVALID, "invalid_api_key"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error", "permission_denied"),
    grpc.StatusCode.NOT_FOUND: (404, _INVALID, "not_found"),
    grpc.StatusCode.ALREADY_EXISTS: (409, _INVALID, "already_exists"),
    grpc.StatusCode.ABORTED: (409, _SERVER, "aborted"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error", "rate_limit_exceeded"),
    grpc.StatusCode.CANCELLED: (499, _INVALID, "cancelled"),
    grpc.StatusCode.INTERNAL: (500, _SERVER, "internal_error"),
    grpc.StatusCode.UNKNOWN: (500, _SERVER, "internal_error"),
    grpc.StatusCode.DATA_LOSS: (500, _SERVER, "internal_error"),
    grpc.StatusCode.UNIMPLEMENTED: (501, _SERVER, "not_implemented"),
    grpc.StatusCode.UNAVAILABLE: (503, _SERVER, "unavailable"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error", "deadline_exceeded"),
}
_CODES_OF_PYDANTIC: Final = {"missing": "missing_required_parameter", "unsupported": "unsupported_parameter"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="What is wrong and what to do, for people.")
    type: str = Field(description="The kind of failure.")
    param: str | None = Field(None, description="The field of the request that is to blame.")
    code: str | None = Field(None, description="The failure, for programs.")


class ErrorBody(BaseModel):
    """A failure."""

    error: ErrorDetail


class RequestRefused(Exception):
    """A failure with the HTTP status that the client is to see."""

    def __init__(self, status: int, detail: ErrorDetail, *, retry_delay_s: float | None = None) -> None:
        super().__init__(detail.message)
        self.status = status
        self.body = ErrorBody(error=detail)
        self.retry_delay_s = retry_delay_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers that say when to come again, and how to be let in."""
        headers = {}
        if self.retry_delay_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_delay_s)))
            headers["retry-after-ms"] = str(math.ceil(self.retry_delay_s * 1000))  # what OpenAI's clients look at first
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status == 503:
            # The next try shall find another router behind the same name, if there is one.
            headers["connection"] = "close"
        return headers


def invalid(param: str | None, message: str, code: str = "invalid_value", *, status: int = 400) -> RequestRefused:
    """A request that can never succeed as it is."""
    text = f"{param}: {message}" if param else message
    return RequestRefused(status, ErrorDetail(message=text, type=_INVALID, param=param, code=code))


def from_status(error: StatusError, param_of: Callable[[str], str] = str) -> RequestRefused:
    """What the router says. ``param_of`` gives the client's name of a field of GenerateRequest."""
    status, kind, code = _KINDS.get(error.code, _KINDS[grpc.StatusCode.UNKNOWN])
    message, param = error.message, None
    for detail in error.details:
        if isinstance(detail, error_details_pb2.BadRequest) and detail.field_violations:
            violation = detail.field_violations[0]
            param = param_of(violation.field)
            message = f"{param}: {violation.description}"
        elif isinstance(detail, error_details_pb2.ErrorInfo) and detail.reason:
            code = detail.reason.lower()
    if error.code is grpc.StatusCode.NOT_FOUND and param == "model":
        code = "model_not_found"
    refusal = ErrorDetail(message=message, type=kind, param=param, code=code)
    return RequestRefused(status, refusal, retry_delay_s=error.retry_delay_s)


def from_validation(error: ValidationError) -> RequestRefused:
    """The first thing that pydantic found wrong with a body."""
    return _from_problem(error.errors(include_url=False, include_input=False, include_context=False)[0])


def _from_problem(found: Mapping[str, Any]) -> RequestRefused:
    if found["type"] == "json_invalid":
        return invalid(None, f"the body is not JSON: {found['msg'].removeprefix('Invalid JSON: ')}", "invalid_json")
    code = _CODES_OF_PYDANTIC.get(found["type"], "invalid_type" if found["type"].endswith("_type") else "invalid_value")
    return invalid(_path(found["loc"]) or None, _lower_first(found["msg"]), code)


def internal(what: str, error: BaseException) -> RequestRefused:
    """A fault of ours: the log has it under a reference, the client only that."""
    reference = secrets.token_hex(4)
    log.error("%s failed (reference %s)", what, reference, exc_info=error)
    message = f"internal error; the server's log has it under {reference}"
    return RequestRefused(500, ErrorDetail(message=message, type=_SERVER, code="internal_error"))


def respond(error: RequestRefused, *, request_id: str = "") -> Response:
    """The refusal as a response."""
    headers = error.headers | ({"x-request-id": request_id} if request_id else {})
    return Response(
        error.body.model_dump_json(), error.status, media_type="application/json; charset=utf-8", headers=headers
    )


def answer_in_openai_shape(app: FastAPI, *, refused: Callable[[str], None]) -> None:
    """Register handlers for all that routes raise and for what HTTP itself refuses. ``refused`` counts, by status, what
    has not become a request of the router's, which counts those itself."""

    def answer(request: Request, error: RequestRefused) -> Response:
        request_id = str(getattr(request.state, "request_id", ""))
        if not request_id:
            refused(str(error.status))
        return respond(error, request_id=request_id)

    async def on_refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestRefused)
        return answer(request, error)

    async def on_status(request: Request, error: Exception) -> Response:
        assert isinstance(error, StatusError)
        return answer(request, from_status(error))

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = error.errors()[0]
        return answer(request, _from_problem({**found, "loc": found["loc"][1:]}))  # without "query" or "path"

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            message = f"there is nothing to {request.method} at this path; /openapi.json has all there is"
            found = invalid(None, message, "unknown_url", status=404)
        elif error.status_code == 405:
            found = invalid(None, f"{request.method} is not allowed here", "method_not_allowed", status=405)
        else:
            found = invalid(None, str(error.detail), "http_error", status=error.status_code)
        response = answer(request, found)
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(RequestRefused, on_refused)
    app.add_exception_handler(StatusError, on_status)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)


class InternalErrors:
    """Middleware around everything: what nobody has caught becomes one line of the log and a plain 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, note)
        except ClientDisconnect:
            pass  # before its body had come
        except Exception as error:
            refused = internal(f"{scope.get('method', '')} {scope.get('path', '')}", error)
            if not started:
                await respond(refused)(scope, receive, send)


def _path(location: Sequence[int | str]) -> str:
    """``messages[0].role`` of pydantic's location, without the tags of unions, which begin with <."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path


def _lower_first(message: str) -> str:
    message = re.sub(r"^(Input|Value|List) should", "should", message)
    return message[:1].lower() + message[1:]
