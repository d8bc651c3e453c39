"""One sequence while an instance has it: its tokens, how far their KV is computed, and the blocks that hold it.

Owns state and derived quantities; the scheduler owns every change of status.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from starmesh.types import SamplingParams, SequenceLoad, SequenceSpec


class SequenceStatus(Enum):
    """Where a sequence stands in its instance."""

    WAITING = "waiting"  # for blocks or a place in the batch; holds no blocks
    RUNNING = "running"  # in the batch of every step
    HELD = "held"  # out of the batch, its blocks kept for another instance to pull


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence in progress.

    There is no prefill or decode phase: a step computes some tokens more until ``computed_tokens`` catches up with
    ``tokens``, and the step that catches up samples the next one. A sequence that decodes has one token to compute,
    a new or preempted one all of them. (The idea is vLLM v1's.)
    """

    request_id: str
    epoch: int
    priority: int
    sampling: SamplingParams
    prompt_tokens: int
    token_ids: MutableSequence[int]  # prompt, then output; a simulator only counts them
    arrival: int  # counts up over the instance's sequences
    hold: bool = False  # to be held once its next token is sampled
    status: SequenceStatus = SequenceStatus.WAITING
    computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)  # of the first full blocks; tokens never change
    published_blocks: int = 0
    cached_tokens: int = 0  # found in the prefix cache when it was first admitted
    preemptions: int = 0
    queued_at_s: float = 0.0
    queue_duration_s: float | None = None  # until its first step; None before

    @classmethod
    def from_spec(cls, spec: SequenceSpec, *, arrival: int, queued_at_s: float, hold: bool = False) -> Sequence:
        """A new sequence that waits."""
        return cls(
            request_id=spec.request_id,
            epoch=spec.epoch,
            priority=spec.priority,
            sampling=spec.sampling,
            prompt_tokens=len(spec.prompt_token_ids),
            token_ids=[*spec.prompt_token_ids, *spec.output_token_ids],
            arrival=arrival,
            hold=hold,
            queued_at_s=queued_at_s,
        )

    @property
    def tokens(self) -> int:
        """Prompt and output tokens together."""
        return len(self.token_ids)

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far, on other instances too."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def uncomputed_tokens(self) -> int:
        """Tokens whose KV is still to be computed before the next token can be sampled; at least 1."""
        return len(self.token_ids) - self.computed_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts sequences by who keeps its blocks: higher priority first, then the older one."""
        return (-self.priority, self.arrival)

    @property
    def turn(self) -> tuple[int, bool, int]:
        """Sorts waiting sequences: as ``rank``, but a preempted sequence goes before those that never ran."""
        return (-self.priority, self.preemptions == 0, self.arrival)

    def spec(self) -> SequenceSpec:
        """What another instance needs to continue it from here."""
        return SequenceSpec(
            request_id=self.request_id,
            epoch=self.epoch,
            prompt_token_ids=tuple(self.token_ids[: self.prompt_tokens]),
            output_token_ids=tuple(self.token_ids[self.prompt_tokens :]),
            sampling=self.sampling,
            priority=self.priority,
        )

    def load(self) -> SequenceLoad:
        """What it weighs now."""
        return SequenceLoad(
            request_id=self.request_id,
            epoch=self.epoch,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            resident_tokens=self.computed_tokens,
            max_output_tokens=self.sampling.max_output_tokens,
        )


class MakeSequence(Protocol):
    """Makes the sequence that a scheduler keeps of a spec; ``Sequence.from_spec`` is one."""

    def __call__(self, spec: SequenceSpec, *, arrival: int, queued_at_s: float, hold: bool = False) -> Sequence: ...
