"""The policies by name: how far each looks ahead, and the steps that choose its moves.

Owns the registry. ``none`` decides nothing at all: a draining instance empties itself (``starmesh.policy.evacuation``).
Every other policy empties draining instances first, and none puts a sequence where memory may run out over the horizon;
they differ in what they balance and how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from starmesh.policy.rescheduling.llumnix import pair_by_freeness
from starmesh.policy.rescheduling.relief import drain, relieve
from starmesh.policy.rescheduling.round import Round
from starmesh.policy.rescheduling.select import at_any_cost, in_sequence_seconds, level
from starmesh.policy.rescheduling.sequences import Foresight

Step = Callable[[Round], None]


@dataclass(frozen=True, slots=True)
class ReschedulingPolicy:
    """A policy by name: its steps choose moves one after another on the same round."""

    name: str
    foresight: Foresight
    steps: tuple[Step, ...]


def move_best(round_: Round) -> None:
    """STAR: the move that reduces the spread of load most."""
    level(round_, at_any_cost(round_), round_.config.star_moves_per_round)


def move_while_worth_it(round_: Round) -> None:
    """Moves, the best first, until none gains more than it costs."""
    level(round_, in_sequence_seconds(round_), round_.budget)


POLICIES: Mapping[str, ReschedulingPolicy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            ReschedulingPolicy("none", Foresight.NOW, ()),
            ReschedulingPolicy("current_load", Foresight.NOW, (drain, move_best)),
            ReschedulingPolicy("llumnix", Foresight.NOW, (drain, pair_by_freeness)),
            ReschedulingPolicy("star", Foresight.MEAN, (drain, move_best)),
            ReschedulingPolicy("star_plus", Foresight.RESOLVED, (drain, relieve, move_while_worth_it)),
        )
    }
)
