"""What waits to be sent to the predictor: samples of sequences, and their ends. Pure.

Bounded, for the predictor may be slow or gone and decode waits for nobody: the newest sample of a sequence takes the
place of its older one, and when there is no room the oldest goes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from starmesh.types import FinishReason, RemainingEstimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A sequence at its ``output_tokens``-th output token. ``hidden_state`` is packed; ``previous`` is the estimate
    that there was."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    hidden_state: bytes
    previous: RemainingEstimate | None = None


@dataclass(frozen=True, slots=True)
class End:
    """A sequence has ended, with so many output tokens in all."""

    request_id: str
    output_tokens: int
    finish_reason: FinishReason


class SampleQueue:
    """At most ``bound`` samples, one of each sequence, and as many ends."""

    def __init__(self, bound: int) -> None:
        self.dropped_samples = 0
        """Samples that made room for others, since the start; not those that a newer one of their sequence replaced."""
        self.dropped_ends = 0
        """As many ends."""
        self._bound = bound
        self._samples: dict[str, Sample] = {}  # the oldest first
        self._ends: deque[End] = deque()

    def __len__(self) -> int:
        """Samples and ends together."""
        return len(self._samples) + len(self._ends)

    def add(self, sample: Sample) -> None:
        """Queue a sample, in place of an older one of its sequence."""
        self._samples.pop(sample.request_id, None)
        if len(self._samples) >= self._bound:
            del self._samples[next(iter(self._samples))]
            self.dropped_samples += 1
        self._samples[sample.request_id] = sample

    def end(self, end: End) -> None:
        """Queue an end, after all samples of its sequence."""
        if len(self._ends) >= self._bound:
            self._ends.popleft()
            self.dropped_ends += 1
        self._ends.append(end)

    def take(self, limit: int) -> tuple[list[Sample], list[End]]:
        """Remove and return the oldest samples and ends, at most ``limit`` of each. No end comes before a sample of its
        sequence."""
        samples = [self._samples.pop(request_id) for request_id in list(self._samples)[:limit]]
        ends: list[End] = []
        while self._ends and len(ends) < limit and self._ends[0].request_id not in self._samples:
            ends.append(self._ends.popleft())
        return samples, ends
