"""The way to the predictor: sends what is queued, one call at a time, and hands the estimates on.

Owns the connection, the pauses after failures and what the log says of them. A call that fails may have been done, so
what it carried is not sent again: newer samples are on their way. What is still queued waits until the predictor
answers, or is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import grpc
import grpc.aio

from services.decode.config import PredictorConfig
from services.decode.sample_queue import End, Sample, SampleQueue
from starmesh.ledger import LedgerError
from starmesh.rpc import convert
from starmesh.rpc.channels import open_channel
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.server import MAX_MESSAGE_BYTES
from starmesh.types import HiddenLayout, RemainingEstimate
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc

log = logging.getLogger(__name__)

MAX_CALL_SAMPLES: Final = 1024
"""The protocol's bound, of samples and of ends."""
_SAMPLE_OVERHEAD_BYTES: Final = 256  # ids and counts
_REFUSALS: Final = frozenset({grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT})


class _NoAnswer(Exception):
    """Why there is none. ``refused`` when asking again soon is of no use."""

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused


@dataclass(slots=True)
class _Pause:
    """How long to leave the predictor alone: longer after each failure."""

    config: PredictorConfig
    next_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.next_s = self.config.first_pause_s

    def after(self, failure: _NoAnswer) -> float:
        """Seconds, somewhat at random: the instances of a cluster should not all come at once."""
        pause_s = self.config.refused_pause_s if failure.refused else self.next_s
        self.next_s = min(2 * self.next_s, self.config.longest_pause_s)
        return random.uniform(0.5, 1.0) * pause_s  # noqa: S311 - no secret


class PredictorLink:
    """Runs from the first ``wake`` to ``close``."""

    def __init__(
        self,
        queue: SampleQueue,
        config: PredictorConfig,
        credentials: Credentials | None,
        *,
        instance_id: str,
        layout: HiddenLayout,
        find: Callable[[], Awaitable[str | None]],
        on_estimate: Callable[[Sample, RemainingEstimate], None],
    ) -> None:
        """``find`` looks a predictor's address up, and may raise LedgerError; ``on_estimate`` gets each estimate as of
        its sample."""
        self._queue = queue
        self._config = config
        self._credentials = credentials
        self._generation = 0
        self._instance_id = instance_id
        self._layout = convert.hidden_layout_pb(layout)
        room = MAX_MESSAGE_BYTES // 2 // (layout.state_bytes + _SAMPLE_OVERHEAD_BYTES)
        self._call_samples = max(1, min(MAX_CALL_SAMPLES, room))
        self._find = find
        self._on_estimate = on_estimate
        self._due = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._address = ""
        self._channel: grpc.aio.Channel | None = None
        self._look_up = True
        self._pause = _Pause(config)
        self._state = ""

    @property
    def answers(self) -> bool:
        """Whether the last call was answered."""
        return self._state == "answers"

    def wake(self) -> None:
        """Something was queued."""
        self._due.set()
        if self._task is None and not self._closing.is_set():
            self._task = asyncio.create_task(self._run(), name="predictor link")

    async def close(self) -> None:
        """Send what is queued if the predictor answers, within the time of one call, and disconnect."""
        self._closing.set()
        self._due.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self._config.timeout_s)
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._disconnect()

    async def _run(self) -> None:
        while not self._closing.is_set():
            await self._due.wait()
            self._due.clear()
            # At the end what is left goes out if that takes one call: nobody waits for a predictor that is gone.
            while len(self._queue) and (self.answers or not self._closing.is_set()):
                try:
                    await self._exchange()
                except _NoAnswer as failure:
                    self._look_up = True
                    self._note("refuses" if failure.refused else "silent", str(failure))
                    await self._rest(self._pause.after(failure))
                except Exception:
                    # A bug must not end predictions for good.
                    log.exception("a call to the predictor failed")
                    await self._rest(self._config.longest_pause_s)

    async def _rest(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._closing.wait()

    async def _exchange(self) -> None:
        stub = await self._connect()
        samples, ends = self._queue.take(self._call_samples)
        response = await self._call(stub, self._request(samples, ends))
        if len(response.estimates) > len(samples):
            raise _NoAnswer(f"it answered {len(samples)} samples with {len(response.estimates)} estimates")
        self._pause = _Pause(self._config)
        self._note("answers", self._address)
        asked = {sample.request_id: sample for sample in samples}
        for found in response.estimates:
            sample = asked.pop(found.request_id, None)
            if sample is not None:
                self._on_estimate(sample, convert.estimate(found.estimate))

    async def _call(
        self, stub: predictor_pb2_grpc.PredictorServiceAsyncStub, request: predictor_pb2.PredictRequest
    ) -> predictor_pb2.PredictResponse:
        try:
            response: predictor_pb2.PredictResponse = await stub.Predict(request, timeout=self._config.timeout_s)
        except grpc.aio.AioRpcError as error:
            code = error.code()
            raise _NoAnswer(f"{code.name}: {error.details()}", refused=code in _REFUSALS) from None
        return response

    async def _connect(self) -> predictor_pb2_grpc.PredictorServiceAsyncStub:
        """A connection that stands: nothing is taken from the queue for one that does not."""
        if self._look_up or (self._credentials is not None and self._credentials.generation != self._generation):
            await self._turn_to(await self._known_address())
            self._look_up = False
        assert self._channel is not None
        try:
            async with asyncio.timeout(self._config.timeout_s):
                stands = await _is_ready(self._channel)
        except TimeoutError:
            stands = False
        if not stands:
            # Begun anew the next time: gRPC's own pauses would come on top of ours.
            await self._disconnect()
            raise _NoAnswer(f"{self._address} does not connect")
        stub: predictor_pb2_grpc.PredictorServiceAsyncStub = predictor_pb2_grpc.PredictorServiceStub(self._channel)
        return stub

    async def _known_address(self) -> str:
        try:
            found = await self._find()
        except LedgerError as error:
            if not self._address:
                raise _NoAnswer(f"the ledger does not say where it is: {error}") from None
            return self._address
        if found is None:
            raise _NoAnswer("none is registered; start one, or give --no-predict")
        return found

    async def _turn_to(self, address: str) -> None:
        # With a certificate that has been replaced it could not connect again.
        generation = 0 if self._credentials is None else self._credentials.generation
        if address != self._address or generation != self._generation or self._channel is None:
            await self._disconnect()
            self._address, self._generation = address, generation
            self._channel = open_channel(address, self._credentials)

    async def _disconnect(self) -> None:
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close()

    def _request(self, samples: list[Sample], ends: list[End]) -> predictor_pb2.PredictRequest:
        return predictor_pb2.PredictRequest(
            instance_id=self._instance_id,
            layout=self._layout,
            samples=[
                predictor_pb2.PredictionSample(
                    request_id=sample.request_id,
                    prompt_tokens=sample.prompt_tokens,
                    output_tokens=sample.output_tokens,
                    hidden_state=sample.hidden_state,
                    previous=None if sample.previous is None else convert.estimate_pb(sample.previous),
                    traceparent=sample.traceparent,
                )
                for sample in samples
            ],
            ends=[
                predictor_pb2.SequenceEnd(
                    request_id=end.request_id,
                    output_tokens=end.output_tokens,
                    finish_reason=convert.finish_reason_pb(end.finish_reason),
                )
                for end in ends
            ],
        )

    def _note(self, state: str, what: str) -> None:
        """Log a change of state, once."""
        if state == self._state:
            return
        before, self._state = self._state, state
        if state == "answers":
            log.info("the predictor at %s answers%s", what, " again" if before else "")
        elif state == "refuses":
            log.warning("the predictor refuses the hidden states of this instance, estimates age: %s", what)
        else:
            log.warning("no predictor answers, estimates age: %s", what)


async def _is_ready(channel: grpc.aio.Channel) -> bool:
    """Whether it connects; False as soon as it is refused."""
    state = channel.get_state(try_to_connect=True)
    while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
    return state is grpc.ChannelConnectivity.READY
