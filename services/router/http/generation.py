"""The two routes that generate: POST /v1/chat/completions and /v1/completions."""

# No postponed annotations: FastAPI could not see the door in them, which is a local name.

import time
from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request
from google.protobuf.duration_pb2 import Duration
from starlette.responses import Response

from services.router.http.answers import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk
from services.router.http.body import BodyReader
from services.router.http.caller import Caller, Door
from services.router.http.chat_request import ChatRequest
from services.router.http.choices import Choices
from services.router.http.completion_request import CompletionRequest
from services.router.http.errors import ErrorBody
from services.router.http.formats import ChatFormat, CompletionFormat, Format, Identity
from services.router.http.parts import HttpParts
from services.router.http.sse import EventStream
from services.router.http.whole import COALESCE_S, WholeAnswer

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorBody, "description": "It can never succeed as it is; param names the field."},
    401: {"model": ErrorBody, "description": "No API key, or one that is not known or has expired."},
    403: {"model": ErrorBody, "description": "The key may not generate."},
    404: {"model": ErrorBody, "description": "Another model is served here."},
    408: {"model": ErrorBody, "description": "The body did not come in time."},
    409: {"model": ErrorBody, "description": "A request of this id is in flight."},
    413: {"model": ErrorBody, "description": "The body is too long."},
    415: {"model": ErrorBody, "description": "The body is not application/json."},
    429: {"model": ErrorBody, "description": "No room, or a limit of the key: come again after Retry-After."},
    499: {"model": ErrorBody, "description": "The request was cancelled by its id."},
    500: {"model": ErrorBody, "description": "A fault of the server; its log has it."},
    503: {"model": ErrorBody, "description": "No instance is up, or this router is stopping: come again."},
    504: {"model": ErrorBody, "description": "The answer took longer than requests may."},
}


def generation_routes(parts: HttpParts, door: Door) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1")
    reader = BodyReader()

    @routes.post(
        "/chat/completions",
        response_model=None,
        operation_id="create_chat_completion",
        responses=_responses(ChatCompletion, ChatCompletionChunk),
        openapi_extra=_body(ChatRequest),
    )
    async def create_chat_completion(request: Request, caller: Annotated[Caller, Depends(door)]) -> Response:
        """Answer a conversation."""
        return _respond(parts, caller, await reader.read(request, ChatRequest), ChatFormat)

    @routes.post(
        "/completions",
        response_model=None,
        operation_id="create_completion",
        responses=_responses(Completion, CompletionChunk),
        openapi_extra=_body(CompletionRequest),
    )
    async def create_completion(request: Request, caller: Annotated[Caller, Depends(door)]) -> Response:
        """Continue a text."""
        return _respond(parts, caller, await reader.read(request, CompletionRequest), CompletionFormat)

    return routes


def _respond(
    parts: HttpParts, caller: Caller, body: ChatRequest | CompletionRequest, make_format: Callable[..., Format]
) -> Response:
    # Before the prompt is copied for each of them.
    caller.count(body.count())
    requests = body.requests()
    request_id = caller.name(body.request_id, requests)
    if not body.stream:
        for request in requests:
            request.coalesce_window.CopyFrom(Duration(seconds=int(COALESCE_S)))
    choices = Choices(parts.router, requests, per_prompt=body.choices, key_id=caller.key_id, parent=caller.trace)
    identity = Identity(
        request_id=request_id,
        created=int(time.time()),
        model=parts.model.name,
        fingerprint=f"fp_{parts.model.revision}",
    )
    format_ = make_format(identity, includes_usage=body.includes_usage)
    headers = {"x-request-id": request_id}
    if not body.stream:
        return WholeAnswer(choices, format_, param_of=body.param_of, headers=headers)
    return EventStream(choices, format_, includes_usage=body.includes_usage, param_of=body.param_of, headers=headers)


def _responses(whole: type[Any], chunk: type[Any]) -> dict[int | str, dict[str, Any]]:
    stream = {"text/event-stream": {"schema": {"$ref": f"#/components/schemas/{chunk.__name__}"}}}
    return {200: {"model": whole, "content": stream, "description": "The answer; with stream, its events."}, **_ERRORS}


def _body(model: type[Any]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
