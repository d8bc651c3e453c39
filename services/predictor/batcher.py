"""Forwards in one thread, of all that waits at the moment it becomes free.

Owns the forward thread, what waits for it, and when a call is over. Owns neither the choice of a version (``registry``)
nor what becomes of its estimates. Everything that learns, learns on that thread, between two batches, so it needs no
lock: predictors, their recalibration, the conditional median.

Batching needs no window to wait for: while one batch is computed the next one gathers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import grpc
import numpy as np
import numpy.typing as npt

from services.predictor.forward_span import forward_span
from services.predictor.intake import Samples
from services.predictor.metrics import PredictorMetrics
from services.predictor.outcomes import Outcome
from services.predictor.registry import Version
from services.predictor.sample_queue import SampleQueue
from starmesh.clock import WallClock
from starmesh.prediction.averaging import RunningAverages
from starmesh.prediction.batch import Floats, SampleBatch
from starmesh.rpc.status import StatusError
from starmesh.types import HiddenLayout

log = logging.getLogger(__name__)

MAX_BATCH: Final = 256
"""Rows of a forward: a batch of 256 takes little longer for each row than a larger one, and newer samples wait less."""
MAX_OUTCOMES: Final = 4096
"""Outcomes that wait to be learned from; older ones are given up."""
AVERAGES_BYTES: Final = 256 << 20
"""What the averaged states of running sequences may take: over 100,000 sequences of the default model, of one layer."""
_MAX_REMAINING: Final = float(1 << 30)


@dataclass(slots=True, eq=False)
class _Call:
    """A call's samples, and what has been answered of them so far: rows of NaN have no answer."""

    samples: Samples
    version: Version
    arrived_s: float
    open_rows: int
    done: asyncio.Future[None]
    predicted: Floats
    answered: Floats
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """The ``rows`` of a call that were answered, [k], ascending: what the version said, [k, 2], and the same corrected,
    in whole tokens. ``traceparent`` is the last forward's trace context."""

    rows: npt.NDArray[np.int64]
    predicted: Floats
    answered: Floats
    traceparent: str


class Batcher:
    """Predicts for many callers. Made in a running event loop; ``learn`` is called on the forward thread."""

    def __init__(self, *, capacity: int, metrics: PredictorMetrics, learn: Callable[[Sequence[Outcome]], None]) -> None:
        self._queue: SampleQueue[_Call, Version] = SampleQueue(capacity)
        self._metrics = metrics
        self._learn = learn
        self._averages: tuple[HiddenLayout, RunningAverages] | None = None
        self._outcomes: deque[Outcome] = deque(maxlen=MAX_OUTCOMES)
        self._clock = WallClock()
        self._wanted = asyncio.Event()
        self._broken: Version | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._turning = asyncio.create_task(self._turn(), name="batcher")

    def __len__(self) -> int:
        return len(self._queue)

    async def predict(self, version: Version, samples: Samples, *, timeout_s: float) -> Answers:
        """Returns when every sample was answered or dropped, or the time is over; of a call that is cancelled nothing
        stays queued. Raises StatusError when the predictor failed, or answered none of them in time."""
        count = len(samples)
        empty = np.full((2, count, 2), np.nan, dtype=np.float32)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        call = _Call(samples, version, self._clock.now_s(), count, done, empty[0], empty[1])
        for row in range(count):
            dropped = self._queue.push(call, row, version)
            if dropped is not None:
                self._metrics.dropped(1, "queue_full")
                self._settle(dropped[0], 1)
        self._wanted.set()
        try:
            async with asyncio.timeout(timeout_s):
                await done
        except TimeoutError:
            self._metrics.dropped(call.open_rows, "timeout")
            if not len(_answered_rows(call)):
                raise StatusError(
                    grpc.StatusCode.DEADLINE_EXCEEDED, f"no forward of {version.name} ended within {timeout_s:.2f} s"
                ) from None
        except asyncio.CancelledError:
            # What was answered already does not reach the caller either.
            self._metrics.dropped(call.open_rows + len(_answered_rows(call)), "caller_gone")
            raise
        except StatusError:
            self._metrics.dropped(call.open_rows, "failed")
            raise
        finally:
            self._queue.discard(call)
        rows = _answered_rows(call)
        if len(rows):
            self._metrics.answered(len(rows), self._clock.now_s() - call.arrived_s)
        return Answers(rows, call.predicted[rows], call.answered[rows], call.traceparent)

    def learn(self, outcome: Outcome) -> None:
        """Learn from an outcome before the next forward."""
        self._outcomes.append(outcome)
        self._wanted.set()

    async def close(self) -> None:
        """End after the forward in progress."""
        self._turning.cancel()
        await asyncio.wait([self._turning])
        await asyncio.to_thread(self._thread.shutdown)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while self._queue or self._outcomes:
                outcomes = list(self._outcomes)
                self._outcomes.clear()
                version, rows = self._queue.take(MAX_BATCH)
                by_call = _by_call(rows)
                self._note_batch(by_call)
                try:
                    with forward_span(version, [(call.samples, rows) for call, rows in by_call]) as traceparent:
                        found = await loop.run_in_executor(self._thread, self._forward, outcomes, version, by_call)
                    self._deliver(by_call, *found, traceparent)
                    self._broken = None if by_call else self._broken
                except Exception as error:
                    self._fail(version, by_call, error)

    def _forward(
        self, outcomes: Sequence[Outcome], version: Version | None, by_call: list[tuple[_Call, list[int]]]
    ) -> tuple[Floats, Floats]:
        """On the thread: learn, then [n, 2] twice, as predicted and corrected."""
        if outcomes:
            self._learn(outcomes)
        if self._averages is not None:
            for outcome in outcomes:
                self._averages[1].end(outcome.request_id)
        if version is None:
            nothing = np.empty((0, 2), dtype=np.float32)
            return nothing, nothing
        batch = self._joined(version, by_call)
        predicted = version.predictor.predict(batch)
        if predicted.shape != (len(batch), 2):
            raise ValueError(f"it answered {len(batch)} samples with an array of {predicted.shape}")
        corrected = predicted
        if version.recalibration is not None:
            corrected = version.recalibration.correct(batch.output_tokens, predicted)
        # Infinity is no answer either, though clipping would make it one.
        sound = np.isfinite(predicted).all(axis=1, keepdims=True)
        return predicted, np.where(sound, np.clip(corrected, 0.0, _MAX_REMAINING).round(), np.float32(np.nan))

    def _joined(self, version: Version, by_call: list[tuple[_Call, list[int]]]) -> SampleBatch:
        """One batch of the rows of several calls. A predictor that looks at no hidden states gets none: those of two
        models cannot stand in one array."""
        prompts = np.concatenate([call.samples.prompt_tokens[rows] for call, rows in by_call])
        outputs = np.concatenate([call.samples.output_tokens[rows] for call, rows in by_call])
        layout = version.predictor.layout
        if layout is None or not layout.layers:
            nothing = np.zeros((len(outputs), 0, 0), dtype=np.float16)
            return SampleBatch(hidden_states=nothing, prompt_tokens=prompts, output_tokens=outputs)
        # Instances may keep more layers than this predictor looks at.
        states = np.concatenate(
            [
                call.samples.hidden_states[rows][
                    :, [call.samples.layout.layers.index(layer) for layer in layout.layers]
                ]
                for call, rows in by_call
            ]
        )
        if self._averages is None or self._averages[0] != layout:
            self._averages = layout, RunningAverages(AVERAGES_BYTES // (2 * layout.state_bytes))
        ids = (call.samples.request_ids[row] for call, rows in by_call for row in rows)
        averages = [
            self._averages[1].add(request_id, position, state)
            for request_id, position, state in zip(ids, outputs.tolist(), states, strict=True)
        ]
        return SampleBatch(
            hidden_states=states, averaged_states=np.stack(averages), prompt_tokens=prompts, output_tokens=outputs
        )

    def _deliver(
        self, by_call: list[tuple[_Call, list[int]]], predicted: Floats, answered: Floats, traceparent: str
    ) -> None:
        start = 0
        for call, rows in by_call:
            call.traceparent = traceparent
            there = slice(start, start + len(rows))
            start += len(rows)
            # A row that is not a number says nothing; its call goes on without it.
            lost = int((~np.isfinite(predicted[there]).all(axis=1)).sum())
            if lost:
                self._metrics.dropped(lost, "not_a_number")
            call.predicted[rows], call.answered[rows] = predicted[there], answered[there]
            self._settle(call, len(rows))

    def _settle(self, call: _Call, rows: int) -> None:
        call.open_rows -= rows
        if call.open_rows == 0 and not call.done.done():
            call.done.set_result(None)

    def _fail(self, version: Version | None, by_call: list[tuple[_Call, list[int]]], error: Exception) -> None:
        if version is None:
            log.error("what became of requests was not learned from", exc_info=error)
            return
        name = version.name
        if version is not self._broken:
            log.error("predictor %s fails; promote another one", name, exc_info=error)
        self._broken = version
        for call, _ in by_call:
            if not call.done.done():
                call.done.set_exception(
                    StatusError(grpc.StatusCode.INTERNAL, f"predictor {name} failed ({error}); promote another one")
                )

    def _note_batch(self, by_call: list[tuple[_Call, list[int]]]) -> None:
        if by_call:
            now_s = self._clock.now_s()
            self._metrics.batch(sum(len(rows) for _, rows in by_call), (now_s - call.arrived_s for call, _ in by_call))


def _by_call(rows: list[tuple[_Call, int]]) -> list[tuple[_Call, list[int]]]:
    grouped = itertools.groupby(rows, key=lambda queued: queued[0])
    return [(call, [row for _, row in queued]) for call, queued in grouped]


def _answered_rows(call: _Call) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.isfinite(call.answered).all(axis=1))
