"""Times steps of an engine: decode at several batch sizes and contexts, and chunks of prompts.

Sequences start as if their KV had been pulled, so that a long context costs no prefill: what the blocks hold does not
change how long a step takes. Owns what is measured, not the engine, and no fitting (``profiles.fit``). Needs no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from starmesh.clock import Clock
from starmesh.engine.engine import EngineCore
from starmesh.instance.measuring import MeasuringFailed
from starmesh.profiles.fit import StepTime
from starmesh.types import SamplingParams, SequenceSpec

STEPS = 3
"""Steps of a batch that decodes, in a round; odd, so that their median is the middle one's."""

_BATCHES = (1, 4, 16, 64, 256)
_CHUNKS = (16, 64, 256, 1024)
_FAR_CHUNK = 64
"""The largest chunk that is measured at the end of a context as long as there can be."""


@dataclass(slots=True)
class _Point:
    """``sequences`` that decode with ``context`` tokens each, or a prompt of which ``context`` tokens are computed and
    ``chunk`` come next."""

    sequences: int
    context: int
    chunk: int = 1
    times: list[float] = field(default_factory=list)

    def step_time(self) -> StepTime:
        """The median of the steps, with the context of the middle one."""
        seconds = statistics.median(self.times)
        if self.chunk > 1:
            pairs = self.chunk * self.context + self.chunk * (self.chunk + 1) // 2
            return StepTime(seconds=seconds, prefill_tokens=self.chunk, prefill_pairs=pairs)
        resident = self.sequences * (self.context + STEPS // 2)
        return StepTime(seconds=seconds, sequences=self.sequences, resident_tokens=resident)

    @property
    def noise(self) -> float:
        """The relative standard deviation of its steps, by their median absolute deviation: outliers don't count."""
        middle = statistics.median(self.times)
        return 1.4826 * statistics.median(abs(time - middle) for time in self.times) / middle


@dataclass(frozen=True, slots=True)
class MeasuredSteps:
    """One median for each kind of step, and the typical relative standard deviation of a step of one kind."""

    times: tuple[StepTime, ...]
    noise: float
    rounds: int


def measure_steps(
    core: EngineCore,
    clock: Clock,
    *,
    max_sequences: int,
    max_step_tokens: int,
    vocabulary_tokens: int,
    budget_s: float,
    on_progress: Callable[[float], None],
) -> MeasuredSteps:
    """Time whole rounds of all kinds of steps for about ``budget_s``, one round at least, so that whatever else the
    machine does befalls all kinds alike. ``core`` is idle, and takes batches and steps of the sizes given.

    ``on_progress`` gets the part that is done. Raises MeasuringFailed.
    """
    run = _Run(core, clock, vocabulary_tokens)
    points = tuple(_points(core, max_sequences=max_sequences, max_step_tokens=max_step_tokens))
    if len({point.sequences for point in points if point.chunk == 1}) < 2:
        raise MeasuringFailed("the KV memory holds too few tokens to measure with: give more with --kv-memory-mib")
    started_s = clock.now_s()
    # The first of each shape also pays for set-up in libraries. Contexts ascend: the first is the cheapest.
    for point in {(point.sequences, point.chunk): point for point in reversed(points)}.values():
        run.steps(point, 1)
    rounds = 0
    while True:
        began_s = clock.now_s()
        for point in points:
            point.times += run.steps(point, STEPS if point.chunk == 1 else 1)
            on_progress(min(1.0, (clock.now_s() - started_s) / budget_s))
        rounds += 1
        now_s = clock.now_s()
        if now_s - started_s + (now_s - began_s) > budget_s:
            break
    noise = statistics.median(point.noise for point in points if len(point.times) >= STEPS)
    return MeasuredSteps(tuple(point.step_time() for point in points), noise, rounds)


def _points(core: EngineCore, *, max_sequences: int, max_step_tokens: int) -> Iterator[_Point]:
    """Batches with little and with as much context as the pool holds, and chunks at a prompt's begin and far in."""
    pool = core.scheduler.pool
    # Admission keeps some blocks free, and a step's new tokens need some.
    blocks = pool.total_blocks - pool.total_blocks // 50 - 1
    longest = core.scheduler.max_sequence_tokens - STEPS - 2
    for sequences in _BATCHES:
        most = min(blocks // sequences * pool.block_tokens, longest) - STEPS - 1
        if sequences > max_sequences or most < 2:
            break
        for context in sorted({min(32, most), most // 2, most}):
            if context > 0:
                yield _Point(sequences, context)
    for chunk in sorted({min(chunk, max_step_tokens) for chunk in _CHUNKS}):
        most = min(blocks * pool.block_tokens, longest) - chunk - 1
        if most >= 0 and chunk > 1:
            # A large chunk far in would take most of the time to say the same of a pair.
            for context in sorted({0, min(most, most * _FAR_CHUNK // chunk)}):
                yield _Point(1, context, chunk)


class _Run:
    def __init__(self, core: EngineCore, clock: Clock, vocabulary_tokens: int) -> None:
        self._core = core
        self._clock = clock
        self._vocabulary_tokens = vocabulary_tokens
        self._epoch = 0

    def steps(self, point: _Point, count: int) -> list[float]:
        """Seconds of each of ``count`` steps."""
        self._epoch += 1
        names = [f"sequence-{index}" for index in range(point.sequences)]
        for name in names:
            self._start(name, point, count)
        times = []
        for _ in range(count):
            started_s = self._clock.now_s()
            outputs = self._core.step()
            times.append(self._clock.now_s() - started_s)
            failed = next((output.error for output in outputs if output.error), None)
            if failed is not None or len(outputs) != point.sequences:
                raise MeasuringFailed(failed or f"{len(outputs)} of {point.sequences} sequences were in a step")
        for name in names:
            self._core.cancel(name)
        return times

    def _start(self, name: str, point: _Point, count: int) -> None:
        tokens = point.context + point.chunk - (point.chunk == 1)
        # Any tokens do, as long as they differ: rows of one table, far apart.
        prompt = tuple(position * 7919 % self._vocabulary_tokens for position in range(tokens))
        sampling = SamplingParams(max_output_tokens=count + 1, ignore_eos=True)
        if self._core.reserve(name, self._epoch, tokens + count + 1) is None:
            raise MeasuringFailed(f"no room for {point.sequences} sequences of {tokens} tokens in an idle engine")
        self._core.start(SequenceSpec(name, self._epoch, prompt, (), sampling), tokens - point.chunk)
