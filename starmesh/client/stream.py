"""One answer on its way to the caller, over however many calls and routers it takes.

Owns the tokens that have come, the call in progress and the deadline. Owns no decision of what to do about a failure
(``retrying``) and no connection (``routers``).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any, Final, Self

import grpc
import grpc.aio
from grpc_status import rpc_status

from starmesh.client.errors import ClientError
from starmesh.client.options import new_request_id
from starmesh.client.pieces import Answer, FinishReason, Piece, piece_of
from starmesh.client.retrying import Anew, Failure, ReadOn, Retrying, RetryPolicy
from starmesh.client.routers import RouterLink, Routers
from starmesh.client.trace_context import trace_metadata
from starmesh.rpc.status import StatusError, from_rpc_error
from starmesh.v1 import inference_pb2

CANCEL_TIMEOUT_S: Final = 2.0
"""Seconds that a router has to hear that nobody wants a request any more."""
# How a connection's end looks, or that of a proxy between, where the router has not said anything.
_BROKEN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
}


class AnswerStream:
    """An async iterator of pieces, each token and character once. To end early, leave its ``async with`` block, call
    ``cancel``, or let go of it; each cancels the request. Raises ClientError."""

    def __init__(
        self,
        routers: Routers,
        request: inference_pb2.GenerateRequest,
        *,
        timeout_s: float,
        policy: RetryPolicy,
        forget: Callable[[RouterLink, str], None],
    ) -> None:
        """``forget`` tells a router, later, that nobody wants a request any more."""
        self._routers = routers
        self._request = request
        self._first_request_id = request.request_id
        self._loop = asyncio.get_running_loop()
        self._deadline_s = self._loop.time() + timeout_s
        self._resumable = request.HasField("resume_window")
        self._retrying = Retrying(policy, resumable=self._resumable, routers=len(routers), draw=random.random)
        self._forget = forget
        # Whatever calls it takes, at whichever routers, they are of the trace that asked.
        self._metadata = trace_metadata()
        self._token_ids: list[int] = []
        self._link = routers.choose()
        self._call: Any = None
        # Whether a router may be at work on the request.
        self._wanted = False
        self._cancelled = asyncio.Event()
        self._pieces = self._run()

    def __repr__(self) -> str:
        return f"<AnswerStream {self.request_id} {len(self._token_ids)} tokens, at {self._link.address}>"

    @property
    def request_id(self) -> str:
        """The request's id at the router that has it now."""
        return self._request.request_id

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All that have come."""
        return tuple(self._token_ids)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        return await anext(self._pieces)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End it; what is left of the answer is cancelled."""
        await self._pieces.aclose()

    async def whole(self) -> Answer:
        """Read it to its end and return all that comes from here on, in one. Raises RuntimeError after the end."""
        text: list[str] = []
        token_ids: list[int] = []
        async for piece in self:
            text.append(piece.text)
            token_ids += piece.token_ids
            if piece.finish_reason is not None:
                return Answer(
                    text="".join(text),
                    token_ids=tuple(token_ids),
                    finish_reason=piece.finish_reason,
                    usage=piece.usage,
                )
        raise RuntimeError("the answer has been read; ask again")

    async def cancel(self) -> None:
        """Cancel the request, from any task of the same loop: the stream still gives what the router has made until
        then, and ends with CANCELLED. Never fails, whether or not a router can be reached."""
        self._cancelled.set()
        if self._call is None or self._call.done():
            return
        call = self._call
        try:
            request = inference_pb2.CancelRequest(request_id=self.request_id)
            await self._link.stub.Cancel(request, timeout=CANCEL_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            # It has ended, has not arrived yet, or is out of reach: nothing that is still to come is worth waiting for.
            call.cancel()

    def drop(self) -> None:
        """Tell the router that has the request, if one may, that nobody wants it any more. Waits for nothing."""
        if not self._wanted:
            return
        self._wanted = False
        self._call.cancel()
        if self._resumable:  # the router takes a cancelled call for a broken stream
            self._forget(self._link, self.request_id)

    async def _run(self) -> AsyncGenerator[Piece]:
        """Call after call until the answer is complete."""
        try:
            going_on = not self._cancelled.is_set()
            if going_on:
                self._check_open()
                self._generate()
            while going_on:
                try:
                    async for message in self._call:
                        piece = self._accept(message)
                        self._wanted = piece.finish_reason is None
                        yield piece
                        if piece.finish_reason is not None:
                            return
                    failure = Failure(StatusError(grpc.StatusCode.UNAVAILABLE, "the stream ended early"), broken=True)
                except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
                    failure = self._failure(error)
                self._wanted = failure.broken
                going_on = await self._go_on(failure)
            yield Piece(text="", token_ids=(), offset=len(self._token_ids), finish_reason=FinishReason.CANCELLED)
        finally:
            self.drop()

    def _failure(self, error: grpc.aio.AioRpcError | asyncio.CancelledError) -> Failure:
        """Why the call failed. Raises a cancellation of the task itself anew."""
        if isinstance(error, grpc.aio.AioRpcError):
            return Failure(from_rpc_error(error), broken=_is_broken(error))
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise error
        # The call's own cancellation, by ``cancel`` or by the client's end, looks like the task's.
        return Failure(StatusError(grpc.StatusCode.CANCELLED, "cancelled by the client"), broken=True)

    async def _go_on(self, failure: Failure) -> bool:
        """Wait as long as is wise, and make the next call; False when the request has been cancelled. Raises
        ClientError when it is time to give up."""
        if self._cancelled.is_set():
            return False
        self._check_open()
        step = self._retrying.after(failure)
        if step is None or self._loop.time() + step.delay_s >= self._deadline_s:
            raise ClientError.of(failure.status) from None
        if failure.broken:
            self._routers.avoid(self._link)
        if step.delay_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(step.delay_s):
                    await self._cancelled.wait()
                    return False
            self._check_open()
        match step:
            case ReadOn():
                request = inference_pb2.ResumeRequest(request_id=self.request_id, offset=len(self._token_ids))
                self._call = self._link.stub.Resume(request, timeout=self._remaining_s(), metadata=self._metadata)
            case Anew(elsewhere=elsewhere):
                self.drop()
                if elsewhere:
                    self._link = self._routers.choose(other_than=self._link)
                # The former may still be in use, at a router out of reach or in the ledger.
                self._request.request_id = new_request_id(self._first_request_id)
                self._generate()
        return True

    def _generate(self) -> None:
        """Ask for what is left of the answer."""
        request = self._request
        del request.output_token_ids[:]
        request.output_token_ids.extend(self._token_ids)
        self._call = self._link.stub.Generate(request, timeout=self._remaining_s(), metadata=self._metadata)
        self._wanted = True

    def _check_open(self) -> None:
        if self._routers.closed:
            raise ClientError(grpc.StatusCode.CANCELLED, "the client has been closed")

    def _accept(self, message: inference_pb2.GenerateResponse) -> Piece:
        if message.offset != len(self._token_ids):
            raise ClientError(
                grpc.StatusCode.INTERNAL,
                f"{self._link.address} went on at token {message.offset}, {len(self._token_ids)} are here; "
                "is it an older router?",
            )
        if message.token_ids:
            self._token_ids.extend(message.token_ids)
            self._retrying.progressed()
        return piece_of(message)

    def _remaining_s(self) -> float:
        return max(0.0, self._deadline_s - self._loop.time())


def _is_broken(error: grpc.aio.AioRpcError) -> bool:
    """Whether the connection failed: a router sends details, empty ones too, with each status of its own."""
    if error.code() not in _BROKEN:
        return False
    try:
        return rpc_status.from_call(error) is None
    except ValueError:
        return True
