"""An answer as server-sent events.

Owns when something is sent. Nothing queues here: while the socket does not take more, tokens wait in the requests'
flights, bounded by what each may generate, and go out together afterwards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.router.http.choices import Choices
from services.router.http.errors import RequestRefused, from_status, internal
from services.router.http.formats import DONE, Format
from starmesh.rpc.status import StatusError

SILENCE_S: Final = 15.0
"""Seconds without an event until a comment is sent: proxies take a silent connection for dead, many after 60 s."""
_COMMENT: Final = ": still at work\n\n"


class EventStream(Response):
    """Runs the choices and sends their text as it comes."""

    media_type = "text/event-stream"

    def __init__(
        self,
        choices: Choices,
        format_: Format,
        *,
        includes_usage: bool,
        param_of: Callable[[str], str],
        headers: dict[str, str],
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._choices = choices
        self._format = format_
        self._includes_usage = includes_usage
        self._param_of = param_of
        self._silence_s = silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises RequestRefused for a failure before the first event: it can have its own HTTP status then."""
        started = False
        try:
            async with self._choices.attended(receive) as choices:
                async for events in self._events(choices):
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send({"type": "http.response.body", "body": events, "more_body": True})
        except StatusError as error:  # of a request that was not taken in: others are events
            raise from_status(error, self._param_of) from None
        if started and not self._choices.gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, choices: Choices) -> AsyncIterator[bytes]:
        """Each with all that is new when the last one has been taken."""
        format_, opened = self._format, set[int]()
        silent = True
        while choices.unfinished:
            woken = await choices.wait(self._silence_s)
            if choices.gone:
                return
            events: list[str] = [] if woken else [_COMMENT]
            failure: RequestRefused | None = None
            try:
                for index, piece in choices.take():
                    if index not in opened:
                        opened.add(index)
                        events.append(format_.opening(index))
                    if piece.text:
                        events.append(format_.text(index, piece.text))
                    if piece.finish_reason is not None:
                        events.append(format_.ending(index, piece.finish_reason))
            except StatusError as error:
                failure = from_status(error, self._param_of)
            except Exception as error:
                failure = internal("a stream", error)
            if failure is not None:
                if silent and not events:
                    raise failure
                events.append(f"data: {failure.body.model_dump_json()}\n\n")
            if text := "".join(events):
                silent = False
                yield text.encode()
            if failure is not None:
                return
        end = DONE
        if self._includes_usage:
            end = format_.usage(choices.usage).encode() + DONE
        yield end
