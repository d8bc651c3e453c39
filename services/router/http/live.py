"""The live page and its stream of frames.

Owns who may see what, and the headers. The page is the same for everybody and says nothing of the cluster: it needs no
key. The stream does, where there are keys: one with the scope ``operate``, in the ``authorization`` header as in every
other call. EventSource cannot send that header, so the page reads the stream with fetch and keeps the key in its tab's
sessionStorage. A cookie would travel with requests that other sites make, and a key in a URL would end up in logs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from services.router.cluster_frames import ClusterFrames
from services.router.http.live_events import LiveEvents
from services.router.http.live_page import PAGE, PAGE_HEADERS
from starmesh.rpc import api_keys

_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no", "x-content-type-options": "nosniff"}


def live_routes(frames: ClusterFrames, keys: api_keys.ApiKeys | None = None) -> APIRouter:
    """The routes. Without ``keys`` everybody may look on. They raise StatusError."""
    routes = APIRouter(include_in_schema=False)
    events = LiveEvents(frames)

    @routes.get("/")
    @routes.get("/live")
    async def get_page() -> Response:
        return Response(PAGE, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @routes.get("/live/events")
    async def get_events(request: Request) -> Response:
        held = ExitStack()
        try:
            if keys is not None:
                authorization = request.headers.get("authorization")
                held.enter_context(keys.admit(authorization, scope=api_keys.Scope.OPERATE))
            place = events.join()
        except BaseException:
            held.close()
            raise
        held.callback(place.close)
        return _Held(place.events(), held)

    return routes


class _Held(StreamingResponse):
    """Gives back what it holds when it has been sent, or its client has gone."""

    def __init__(self, content: AsyncIterator[bytes], held: ExitStack) -> None:
        super().__init__(content, media_type="text/event-stream", headers=_STREAM_HEADERS)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)
