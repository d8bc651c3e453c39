"""What dispatch is asked, tuned by, remembers and answers, as plain values. Owns no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from starmesh.policy.admission import AdmissionConfig, Need
from starmesh.policy.dispatch.outlook import Outlook
from starmesh.types import RemainingEstimate


class SkipReason(Enum):
    """Why an instance was not considered."""

    EXCLUDED = "excluded"
    """The caller ruled it out: it has just failed or refused this request."""
    NOT_READY = "not_ready"
    STALE = "stale"
    """Its last report is too old to go by."""
    LAYOUT_MISMATCH = "layout_mismatch"
    """No usable instance of the other role exchanges KV with it."""
    TOO_LONG = "too_long"
    """It could not hold the request even if it were empty."""
    QUEUE = "queue"
    """Enough requests wait there already."""
    NO_BLOCKS = "no_blocks"
    PEAK = "peak"
    """It has room now, but its sequences and the request are predicted to outgrow its blocks."""


class NoPlacement(Enum):
    """Why a request has no place."""

    NO_INSTANCE = "no_instance"
    """None is there that could serve it, now or after a wait for room."""
    ALL_DRAINING = "all_draining"
    NO_CAPACITY = "no_capacity"
    """Some would serve it with more room: wait."""
    TOO_LONG = "too_long"
    """No instance will ever hold it."""


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """Bounds of what is considered. ``max_waiting_sequences`` wait on an instance at most: what waits there can no
    longer go elsewhere, while what waits in the router can."""

    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    stale_after_s: float = 5.0
    max_waiting_sequences: int = 16

    horizon_steps: int = 512
    """How far ``predicted_load`` looks ahead for a request of which nothing is predicted. As in
    rescheduling; our choice."""

    min_horizon_steps: int = 32
    """At least so far, since some that are predicted to end at once do not. Our choice."""

    max_horizon_steps: int = 2048
    """At most so far: what runs now says little of what will run then. Our choice."""

    max_prediction_age_tokens: int = 200
    """Predictions for running sequences that are older than this count as none. As in rescheduling."""

    peak_caution: float = 0.0
    """Where between the median (0) and the upper quantile (1) sequences are taken to end for their peak."""

    hold_s: float = 30.0
    """For how long ``held_peak`` lets the first in the queue wait for an instance whose memory will do. Our
    choice: long beside the time between two ends on a full instance, so that only a standstill reaches it."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_horizon_steps <= self.horizon_steps <= self.max_horizon_steps:
            raise ValueError(f"horizon_steps lies within min_horizon_steps and max_horizon_steps, not {self}")
        if not 0 <= self.peak_caution <= 1 or self.hold_s < 0:
            raise ValueError(f"peak_caution lies within 0 to 1 and hold_s is at least 0, not {self}")


@dataclass(frozen=True, slots=True)
class DispatchRequest:
    """What is to be placed. Instances in ``excluded`` have failed or refused it.

    ``estimate`` says what it is predicted to generate after the tokens that ``need`` counts. ``placed_id`` is the
    decode instance that it has a place on already, not counted in the view: it changes only for a better one.
    ``held_s`` says for how long it has been the first of those that wait. All three are for policies that use
    estimates; the others do without.
    """

    request_id: str
    need: Need
    excluded: frozenset[str] = frozenset()
    estimate: RemainingEstimate | None = None
    placed_id: str = ""
    held_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DispatchMemory:
    """What a policy remembers from one choice to the next. ``outlooks`` by instance only save it from reading a report
    again: without them it chooses the same."""

    last_decode_id: str = ""
    outlooks: Mapping[str, Outlook] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """An instance, and the reservation to make there."""

    instance_id: str
    reserve_tokens: int
    limit_tokens: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """An instance that was not considered."""

    instance_id: str
    reason: SkipReason


@dataclass(frozen=True, slots=True)
class Decision:
    """``reason`` is None exactly when what was asked for (both, or the decode instance alone) is chosen; otherwise
    nothing is. ``skipped`` is ordered by role, prefill first, then id."""

    decode: Choice | None = None
    prefill: Choice | None = None
    reason: NoPlacement | None = None
    skipped: tuple[Skipped, ...] = ()
