"""Putting a collection's requests to a router: a bounded number at a time, each to its end, failures and all.

Owns the counting of what became of them. Owns no cluster, no samples and nothing that is shown.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio

from starmesh.cli.collection import CollectionRequest
from starmesh.cli.options import Asking
from starmesh.cli.router import CALL_TIMEOUT_S, RouterClient
from starmesh.rpc.status import from_rpc_error
from starmesh.v1 import inference_pb2, sequence_pb2

_PATIENCE_S = 180.0  # a decode instance that died has started again by then
_RETRY_DELAY_S = 1.0
_RATE_WINDOW_S = 30.0


@dataclass(slots=True)
class Tally:
    """What became of the requests so far. ``lengths`` has the output tokens of those that ended, ``ended`` their ids;
    ``output_tokens`` counts those under way too."""

    total: int
    max_output_tokens: int
    finished: int = 0
    cut: int = 0
    failed: int = 0
    output_tokens: int = 0
    first_failure: str = ""
    lengths: list[int] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    @property
    def done(self) -> int:
        """Requests that are over, however."""
        return self.finished + self.cut + self.failed

    def mark(self, now_s: float) -> None:
        """Remember how many tokens there are now, for the rate."""
        self._marks.append((now_s, self.output_tokens))
        while len(self._marks) > 2 and now_s - self._marks[0][0] > _RATE_WINDOW_S:
            self._marks.popleft()

    @property
    def tokens_per_s(self) -> float:
        """Between the oldest and the newest mark of the last half minute."""
        if len(self._marks) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    @property
    def left_s(self) -> float | None:
        """About how long the rest takes; None before anything ended. All tokens so far over all ends are taken for
        the mean of what each of the others still needs, as if length had no memory: the mean of those that have ended
        would be too short, since the short ones end first. No request needs more than its limit leaves."""
        if not self.lengths or self.tokens_per_s <= 0:
            return None
        left = self.total - self.done
        under_way = self.output_tokens - sum(self.lengths)
        most = self.max_output_tokens * left - under_way
        expected = self.output_tokens / len(self.lengths) * left
        return max(0.0, min(expected, most)) / self.tokens_per_s

    def add_end(self, request_id: str, response: inference_pb2.GenerateResponse) -> None:
        """Count a request by its last message."""
        match response.finish_reason:
            case sequence_pb2.FINISH_REASON_STOP:
                self.finished += 1
            case sequence_pb2.FINISH_REASON_LENGTH:
                self.cut += 1
            case _:
                self.add_failure("cancelled by the cluster")
                return
        self.lengths.append(response.usage.output_tokens)
        self.ended.append(request_id)

    def add_failure(self, reason: str) -> None:
        """Count a request that the cluster will not answer."""
        self.failed += 1
        self.first_failure = self.first_failure or reason


async def ask_all(
    router: RouterClient,
    planned: Sequence[CollectionRequest],
    tally: Tally,
    *,
    temperature: float,
    concurrency: int,
    timeout_s: float,
) -> None:
    """Ask for all, ``concurrency`` at a time, and count in ``tally``. Cancelling it cancels those under way.

    A request that can't be answered as it is (too long, out of time) is counted as failed. Raises AioRpcError when the
    router is none, and when the cluster has not begun to answer a request for three minutes.
    """
    model = await router.inference.GetModel(inference_pb2.GetModelRequest(), timeout=CALL_TIMEOUT_S)
    turns = iter(planned)

    async def client() -> None:
        for each in turns:
            asking = Asking(max_output_tokens=tally.max_output_tokens, temperature=temperature, seed=each.seed)
            request = asking.request(each.prompt, chat=model.has_chat_template)
            request.request_id = each.request_id
            # A message a second is enough to count by, and costs the router next to nothing.
            request.coalesce_window.FromMilliseconds(1000)
            await _ask(router, request, tally, timeout_s=timeout_s)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, len(planned))):
                tasks.create_task(client())
    except* grpc.aio.AioRpcError as errors:
        raise errors.exceptions[0] from None


async def _ask(router: RouterClient, request: inference_pb2.GenerateRequest, tally: Tally, *, timeout_s: float) -> None:
    """One request to its end, as often as it takes."""
    give_up_s = time.monotonic() + _PATIENCE_S
    while True:
        call = router.inference.Generate(request, timeout=timeout_s)
        last = inference_pb2.GenerateResponse()
        tokens = 0
        try:
            async for last in call:
                tokens += len(last.token_ids)
                tally.output_tokens += len(last.token_ids)
            tally.add_end(request.request_id, last)
            return
        except grpc.aio.AioRpcError as error:
            tally.output_tokens -= tokens  # asked for again, or not to be had
            status = from_rpc_error(error)
            delay_s = status.retry_delay_s
            if delay_s is None and status.code is not grpc.StatusCode.UNAVAILABLE:
                tally.add_failure(f"{request.request_id}: {status.message}")
                return
            if tokens:
                give_up_s = time.monotonic() + _PATIENCE_S
            if time.monotonic() > give_up_s:
                raise
        finally:
            call.cancel()
        await asyncio.sleep(max(delay_s or 0.0, _RETRY_DELAY_S))
