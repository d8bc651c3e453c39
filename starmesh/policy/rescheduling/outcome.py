"""What a round decides: the moves, and for everything that was not moved or not considered, why.

Owns the plan and the reason codes. Owns no decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from starmesh.policy.rescheduling.memory import PlanMemory
from starmesh.types import Migration


class InstanceSkip(Enum):
    """Why an instance was neither source nor target."""

    NO_REPORT = "no_report"
    STALE = "stale"
    """Its last report is too old to go by."""
    NO_LAYOUT = "no_layout"
    DRAINED = "drained"
    ALONE = "alone"
    """No other instance that could be a target exchanges KV with it."""


class SequenceSkip(Enum):
    """Why a sequence of an overloaded (or draining, or overfull) instance was not moved: the first that applies, with
    the moves of the round made."""

    IN_FLIGHT = "in_flight"
    COOLING_DOWN = "cooling_down"
    """It has moved, or failed to, a short while ago."""
    NOT_DECODING = "not_decoding"
    """It waits, or its prompt is being computed: there is no whole KV to move."""
    SETTLING = "settling"
    """Its instance has received a sequence a short while ago, or does so now."""
    NOT_AMORTISED = "not_amortised"
    """It will end too soon to be worth its transfer."""
    BUDGET = "budget"
    """Enough migrations are under way: it may be its turn in the next round."""
    NO_TARGET = "no_target"
    """No instance is fit to receive."""
    NO_ROOM = "no_room"
    """Moving it would help, but those that it would help to move to may not hold it over the horizon."""
    NO_GAIN = "no_gain"
    """Moving it would not help, or less than it costs."""


@dataclass(frozen=True, slots=True)
class SkippedInstance:
    """An instance that was not considered."""

    instance_id: str
    reason: InstanceSkip


@dataclass(frozen=True, slots=True)
class SkippedSequences:
    """The candidates of one instance that stay for one reason."""

    instance_id: str
    reason: SequenceSkip
    request_ids: frozenset[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """One round's decision. ``migrations`` in the order of choice, ``skipped`` by instance and reason.

    The spreads are root mean squares of the instances' distance from the mean load (in tokens, over the horizon where
    the policy looks ahead), before and as predicted after the moves. ``memory`` counts the migrations as under way.
    """

    policy: str
    memory: PlanMemory
    migrations: tuple[Migration, ...] = ()
    skipped_instances: tuple[SkippedInstance, ...] = ()
    skipped: tuple[SkippedSequences, ...] = ()
    spread_before_tokens: float = 0.0
    spread_after_tokens: float = 0.0
