"""What became of the requests of a run, live or simulated: the same values for both, so that they can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

MOVED = "moved"


@dataclass(frozen=True, slots=True)
class Served:
    """One request. Seconds from the beginning of the run; ``asked_s`` is when it was due to be sent."""

    request_id: str
    prompt_tokens: int
    output_tokens: int
    asked_s: float
    first_token_s: float
    finished_s: float
    longest_gap_s: float
    migrations: int

    @property
    def ttft_s(self) -> float:
        """From its arrival to its first token."""
        return self.first_token_s - self.asked_s

    @property
    def tpot_s(self) -> float:
        """(end - first token) / (output tokens - 1); 0 for an output of one token."""
        return (self.finished_s - self.first_token_s) / max(1, self.output_tokens - 1)

    @property
    def end_to_end_s(self) -> float:
        """From its arrival to its last token."""
        return self.finished_s - self.asked_s


@dataclass(frozen=True, slots=True)
class Move:
    """A migration that is over; ``outcome`` is ``MOVED`` or says why not."""

    request_id: str
    reason: str
    outcome: str
    duration_s: float
    stood_still_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All of a run. ``unserved`` are the requests that ended without all of their tokens, and why."""

    served: tuple[Served, ...]
    moves: tuple[Move, ...]
    preemptions: int
    unserved: Mapping[str, str] = field(default_factory=dict)

    def moves_by_reason(self) -> dict[str, int]:
        """How many migrations moved their sequence."""
        return dict(sorted(Counter(move.reason for move in self.moves if move.outcome == MOVED).items()))

    def other_ends(self) -> dict[str, int]:
        """How many did not, by why."""
        return dict(sorted(Counter(move.outcome for move in self.moves if move.outcome != MOVED).items()))
