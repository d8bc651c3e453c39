"""Rounds of rescheduling as people are shown them: what each saw, what it moved, and why the rest stayed.

Owns these values and their bounds. Nothing is decided by them: a round's own plan and memory are
``starmesh.policy.rescheduling``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from starmesh.types import Migration

MAX_ROUNDS: Final = 32
"""Summaries that are kept of a cluster."""
MAX_MOVES: Final = 16
"""Moves that one summary lists; ``RoundSummary.planned_moves`` counts them all."""
MAX_REASONS: Final = 32
MAX_TEXT: Final = 200
"""Characters of a reason, a policy's name or the words on an ending."""


class MoveOutcome(Enum):
    """What has become of a planned move."""

    UNDER_WAY = "under_way"
    MOVED = "moved"
    FAILED = "failed"
    """The sequence goes on where it was, or nobody knows where."""
    GONE = "gone"
    """The sequence ended first, or its source had its hands full."""


@dataclass(frozen=True, slots=True)
class RoundMove:
    """A planned move. ``duration_s`` is from the command to the end, 0 where that is not known; ``words`` tell people
    of the end."""

    migration: Migration
    outcome: MoveOutcome = MoveOutcome.UNDER_WAY
    duration_s: float = 0.0
    words: str = ""


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """One round, or ``rounds`` in a row that planned nothing, with the numbers of the last of them.

    ``first_s`` and ``last_s`` are when the first and the last of them looked, on the ledger's clock. The spreads are
    the plan's: root mean squares of the instances' distance from the mean load, in tokens. ``skipped_instances`` and
    ``skipped_sequences`` count by reason code what was not considered and what was not moved.
    """

    leader: str
    term: int
    policy: str
    first_s: float
    last_s: float
    rounds: int = 1
    instances: int = 0
    spread_before_tokens: float = 0.0
    spread_after_tokens: float = 0.0
    planned_moves: int = 0
    moves: tuple[RoundMove, ...] = ()
    skipped_instances: Mapping[str, int] = field(default_factory=dict)
    skipped_sequences: Mapping[str, int] = field(default_factory=dict)
