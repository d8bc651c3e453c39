"""What rescheduling is tuned by. Each value says where it comes from; STAR's own thresholds are not known to us."""

from __future__ import annotations

from dataclasses import dataclass

from starmesh.policy.cost import LAPTOP_CPU, CostModel


@dataclass(frozen=True, slots=True)
class ReschedulingConfig:
    """Bounds and thresholds of a round. "Steps" are decode steps, one token of each sequence. Raises ValueError for
    values out of range."""

    policy: str = "star_plus"
    """A name in ``POLICIES``."""

    cost: CostModel = LAPTOP_CPU
    """Measured on the machine, or a named profile."""

    stale_after_s: float = 2.0
    """Reports older than this are ignored. Our choice: eight reports lost. Less than dispatch's, because a move towards
    an instance that has died is a failure that makes its sequence rest."""

    horizon_steps: int = 512
    """How far ahead load and memory are looked at. The paper's is unknown; our choice: long beside a transfer and a
    round, so that a move pays, and short beside the longest outputs, whose ends nobody can predict."""

    sample_count: int = 8
    """Points of the horizon at which ``star_plus`` compares loads. Our choice."""

    memory_horizons: int = 4
    """How many times ``horizon_steps`` a target must have room for what ``star_plus`` or an instance in need moves to
    it; the others look no further than for load. Our choice, by simulation at the edge of memory: where room lasts no
    longer than ``relieve`` looks ahead, a move only passes the shortage on (docs/rescheduling.md)."""

    memory_bins: int = 16
    """Parts of that time for each of which a target must have room. More bins see earlier that sequences end; fewer
    are never less safe. Our choice."""

    overload_margin: float = 0.05
    """An instance is overloaded above the mean load times 1 + this, underloaded below the mean. The classification by
    the mean is the paper's, the margin our choice."""

    amortisation: float = 2.0
    """A sequence is worth moving only if it will run this many times longer than its transfer takes. The paper says
    "sufficiently exceeds"; our choice."""

    max_prediction_age_tokens: int = 200
    """Predictions older than this count as none. Our choice: ten times the interval between predictions."""

    watermark: float = 0.02
    """The part of a target's blocks that is kept free. As in admission; our choice."""

    max_waiting_sequences: int = 0
    """A target with a longer queue is no target. From Llumnix, whose filter refuses an instance that queues."""

    max_in_flight: int = 16
    """Migrations under way in the cluster at most, earlier rounds' included. Our choice."""

    max_in_flight_per_source: int = 2
    """Our choice: copies share the source's bandwidth, and what is planned now may be wrong by the time it starts."""

    max_in_flight_per_target: int = 2
    """Our choice, as for the source."""

    star_moves_per_round: int = 1
    """Moves of ``star`` and ``current_load`` in one round. The paper takes "the move" that helps most; whether there is
    another in the same round is unknown."""

    cool_down_s: float = 10.0
    """How long a moved sequence stays (drains excepted). The paper's is unknown; our choice: some ten rounds."""

    settle_s: float = 2.0
    """How long the source of a move receives nothing, and its target sends nothing (drains excepted): until both have
    reported what has become of them. Our choice, by simulation (docs/rescheduling.md)."""

    failure_cool_down_s: float = 10.0
    """As ``cool_down_s`` after a failed move of a sequence; doubled with each further failure, up to 64 times this. Our
    choice."""

    max_target_failures: int = 3
    """An instance to which this many moves have failed lately is no target until they are forgotten. Our choice."""

    in_flight_timeout_s: float = 60.0
    """A migration not heard of for so long has failed. Our choice; the protocol's own leases are shorter."""

    hysteresis: float = 32.0
    """``star_plus`` moves what gains this many times what moving it costs, both in sequence-seconds. Our choice, by
    simulation: half the moves of 8 to the same effect (docs/rescheduling.md)."""

    bystander_slowdown: float = 0.01
    """How much slower the other sequences of both ends decode during a transfer. Llumnix reports at most 1 %."""

    freeness_threshold_blocks: float = 3.0
    """``llumnix`` moves away from instances with fewer free blocks per sequence. Its own default
    (``MIGRATE_OUT_THRESHOLD`` of the published code: 3.0 with blocks of 16 tokens)."""

    shortlist: int = 8
    """So many of the most loaded sources and least loaded targets are compared pair by pair. Our choice: it bounds a
    round's work in large clusters, and 8 with two slots each use the whole of ``max_in_flight``. Of 256 instances 16,
    12 and 8 take 11.5, 10.8 and 9.6 % off the spread in a round of 16 moves, in 11.1, 9.5 and 8.6 ms; up to some 16
    instances it leaves nobody out."""

    def __post_init__(self) -> None:
        whole = (
            self.sample_count,
            self.memory_horizons,
            self.memory_bins,
            self.max_in_flight,
            self.max_in_flight_per_source,
            self.max_in_flight_per_target,
            self.star_moves_per_round,
            self.max_target_failures,
            self.shortlist,
        )
        if min(whole) < 1:
            raise ValueError(f"counts, samples and limits are at least 1, not {self}")
        parts = (
            self.stale_after_s,
            self.horizon_steps,
            self.overload_margin,
            self.amortisation,
            self.max_prediction_age_tokens,
            self.max_waiting_sequences,
            self.cool_down_s,
            self.settle_s,
            self.failure_cool_down_s,
            self.in_flight_timeout_s,
            self.hysteresis,
            self.bystander_slowdown,
        )
        if min(parts) < 0 or not 0 <= self.watermark < 1:
            raise ValueError(f"times and thresholds are at least 0 and watermark within 0 to 1, not {self}")
