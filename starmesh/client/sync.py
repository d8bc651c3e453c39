"""The same for programs without an event loop: a thread runs the asyncio client, and callers wait for it.

Owns that thread. Any thread may call, any number at once; one stream belongs to one thread at a time. Ctrl-C ends the
wait, and the request with it.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from starmesh.client.client import DEFAULT_RESUME_WINDOW_S, DEFAULT_TIMEOUT_S, Client
from starmesh.client.options import Message, Options, Prompt
from starmesh.client.pieces import Answer, Piece
from starmesh.client.retrying import RetryPolicy
from starmesh.client.stream import AnswerStream

T = TypeVar("T")


class SyncStream:
    """An iterator of pieces. To end early, leave its ``with`` block, call ``cancel``, or let go of it; each cancels the
    request. Raises ClientError."""

    def __init__(self, stream: AnswerStream, thread: _LoopThread) -> None:
        self._stream = stream
        self._thread = thread

    def __repr__(self) -> str:
        return repr(self._stream).replace("AnswerStream", "SyncStream")

    @property
    def request_id(self) -> str:
        """The request's id at the router that has it now."""
        return self._stream.request_id

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All that have come."""
        return self._stream.token_ids

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        piece = self._thread.wait_for(_next(self._stream))
        if piece is None:
            raise StopIteration
        return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it; what is left of the answer is cancelled."""
        self._thread.wait_for(self._stream.aclose())

    def whole(self) -> Answer:
        """Read it to its end and return all that comes from here on, in one."""
        return self._thread.wait_for(self._stream.whole())

    def cancel(self) -> None:
        """Cancel the request, from any thread: the stream ends with CANCELLED."""
        self._thread.wait_for(self._stream.cancel())


class SyncClient:
    """Asks one or more routers of a mesh. Use it as a context manager, or ``close`` it. Its arguments are those of
    ``Client``."""

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        api_key: str = "",
        tls_ca: str | Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        resume_window_s: float = DEFAULT_RESUME_WINDOW_S,
        retries: RetryPolicy | None = None,
    ) -> None:
        self._client = Client(
            addresses,
            api_key=api_key,
            tls_ca=tls_ca,
            timeout_s=timeout_s,
            resume_window_s=resume_window_s,
            retries=retries or RetryPolicy(),
        )
        self._thread = _LoopThread()
        # Also at the end of the interpreter, before the loop's thread is stopped in the middle of something.
        self._finalizer = weakref.finalize(self, _close, self._client, self._thread)

    def __repr__(self) -> str:
        return f"<Sync{repr(self._client)[1:]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> SyncStream:
        """Continue a text, or tokens. The request is sent when the stream is first read."""
        return self._stream(lambda: self._client.generate(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> SyncStream:
        """Answer a conversation, oldest message first, through the model's chat template."""
        return self._stream(lambda: self._client.chat(messages, **options))

    def text(self, prompt: Prompt | Sequence[Message], **options: Unpack[Options]) -> str:
        """The whole answer's text: to a conversation if ``prompt`` holds messages. Raises ClientError."""
        return self._thread.wait_for(self._client.text(prompt, **options))

    def close(self) -> None:
        """Close the connections. Streams that are being read fail. May be repeated."""
        self._finalizer()

    def _stream(self, make: Callable[[], AnswerStream]) -> SyncStream:
        async def on_the_loop() -> AnswerStream:
            return make()

        return SyncStream(self._thread.wait_for(on_the_loop()), self._thread)


class _LoopThread:
    """A thread that runs an event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="starmesh client", daemon=True)
        self._thread.start()

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` there and wait for what it returns. Whatever ends the wait, Ctrl-C too, cancels it. Raises
        RuntimeError once closed."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop, what still runs on it, and the thread."""
        self.wait_for(_end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _close(client: Client, thread: _LoopThread) -> None:
    thread.wait_for(client.close())
    thread.stop()


async def _next(stream: AnswerStream) -> Piece | None:
    """A coroutine cannot raise StopIteration, and a future not StopAsyncIteration's meaning."""
    return await anext(stream, None)


async def _end_tasks() -> None:
    loop = asyncio.get_running_loop()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
