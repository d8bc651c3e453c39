"""What waits to be sent to the predictor: samples of sequences, and their ends. Pure.

Bounded, for the predictor may be slow or gone and decode waits for nobody: when there is no room the oldest goes. Until
then all samples of a sequence are kept, since the predictor averages over them and a collection stores them.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from starmesh.types import FinishReason, RemainingEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A sequence at its ``output_tokens``-th output token. ``hidden_state`` is packed; ``previous`` is the estimate
    that there was; ``traceparent`` is the request's trace context."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    hidden_state: bytes
    previous: RemainingEstimate | None = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class End:
    """A sequence has ended, with so many output tokens in all."""

    request_id: str
    output_tokens: int
    finish_reason: FinishReason


class SampleQueue:
    """At most ``bound`` samples, one of each sequence and position, and as many ends."""

    def __init__(self, bound: int) -> None:
        self.dropped_samples = 0
        """Samples that made room for others, since the start."""
        self.dropped_ends = 0
        """As many ends."""
        self._bound = bound
        self._samples: dict[tuple[str, int], Sample] = {}  # the oldest first
        self._waiting: Counter[str] = Counter()  # samples of each sequence
        self._ends: deque[End] = deque()

    def __len__(self) -> int:
        """Samples and ends together."""
        return len(self._samples) + len(self._ends)

    def add(self, sample: Sample) -> None:
        """Queue a sample, in place of one at the same position of its sequence."""
        key = (sample.request_id, sample.output_tokens)
        if key in self._samples:
            self._remove(key)
        if len(self._samples) >= self._bound:
            self._remove(next(iter(self._samples)))
            self.dropped_samples += 1
        self._samples[key] = sample
        self._waiting[sample.request_id] += 1

    def end(self, end: End) -> None:
        """Queue an end, after all samples of its sequence."""
        if len(self._ends) >= self._bound:
            self._ends.popleft()
            self.dropped_ends += 1
        self._ends.append(end)

    def take(self, limit: int) -> tuple[list[Sample], list[End]]:
        """Remove and return the oldest samples and ends, at most ``limit`` of each. No end comes before a sample of its
        sequence."""
        samples = [self._remove(key) for key in list(self._samples)[:limit]]
        ends: list[End] = []
        while self._ends and len(ends) < limit and self._ends[0].request_id not in self._waiting:
            ends.append(self._ends.popleft())
        return samples, ends

    def _remove(self, key: tuple[str, int]) -> Sample:
        sample = self._samples.pop(key)
        self._waiting[sample.request_id] -= 1
        if not self._waiting[sample.request_id]:
            del self._waiting[sample.request_id]
        return sample
