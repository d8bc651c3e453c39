"""Settings of a decode instance."""

from dataclasses import dataclass, field, replace

from pydantic import Field

from starmesh.instance.settings import EngineSettings
from starmesh.ledger.limits import OWNER_TTL_S
from starmesh.migration.terms import Limits
from starmesh.policy.rescheduling import ReschedulingConfig

MAX_MIGRATIONS = 4
# Estimates are renewed about once a second: an answer that takes longer is hardly worth waiting for.
PREDICTOR_TIMEOUT_S = 1.0
PREDICTOR_QUEUE_SAMPLES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MigratorConfig:
    """How an instance migrates.

    At most ``max_outgoing`` and ``max_incoming`` are under way. They share one network and, in their copy rounds, the
    memory bandwidth that steps need, so more at a time do not end sooner in all, but each of them later; a few keep the
    link busy while others reserve, freeze or claim. ``owner_ttl_s`` is how long a claimed entry lives until a router
    renews it.
    """

    max_outgoing: int = MAX_MIGRATIONS
    max_incoming: int = MAX_MIGRATIONS
    owner_ttl_s: float = OWNER_TTL_S
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvacuationConfig:
    """How an instance rids itself of sequences.

    ``relief_horizon_s`` is how far ahead it sees to it that its blocks suffice: about two migrations of a second each,
    since what leaves later is preempted before it has gone. ``rescheduling`` bounds moves and targets; after a first
    failure a sequence rests for a second only, because a drain has no more than its grace period.
    """

    relief_horizon_s: float = 2.0
    rescheduling: ReschedulingConfig = field(
        default_factory=lambda: ReschedulingConfig(
            failure_cool_down_s=1.0, max_in_flight_per_source=MAX_MIGRATIONS, max_in_flight_per_target=MAX_MIGRATIONS
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorConfig:
    """How an instance asks the predictor.

    A call may take ``timeout_s``. At most ``queue_samples`` samples, and as many ends of sequences, wait for the next.
    After a failure the predictor is left alone for ``first_pause_s``, doubled each time up to ``longest_pause_s``;
    after a refusal, which a person has to see to, for ``refused_pause_s``.
    """

    timeout_s: float = PREDICTOR_TIMEOUT_S
    queue_samples: int = PREDICTOR_QUEUE_SAMPLES
    first_pause_s: float = 0.1
    longest_pause_s: float = 5.0
    refused_pause_s: float = 30.0


class DecodeSettings(EngineSettings):
    """An engine instance without a prefix cache: its prompts come with their KV."""

    max_timeout_s: float = Field(3600.0, gt=0, description="longest time that a sequence may run")
    max_outgoing_migrations: int = Field(MAX_MIGRATIONS, ge=0, description="sequences that move away at a time")
    max_incoming_migrations: int = Field(MAX_MIGRATIONS, ge=0, description="sequences that are taken in at a time")
    owner_ttl_s: float = Field(
        OWNER_TTL_S, gt=1, description="seconds that the ownership entry of a sequence taken in lives without a router"
    )

    relief_horizon_s: float = Field(
        2.0, gt=0, description="seconds ahead that its blocks must suffice for, or sequences move away"
    )

    predict: bool = Field(True, description="send hidden states to the cluster's predictor")
    predictor_timeout_s: float = Field(
        PREDICTOR_TIMEOUT_S, gt=0, description="time that a call to the predictor may take"
    )
    predictor_queue: int = Field(
        PREDICTOR_QUEUE_SAMPLES,
        ge=1,
        description="samples that may wait for the predictor; the oldest goes for one more",
    )

    @property
    def kept_layers(self) -> tuple[int, ...] | None:
        """As for any engine instance; none when nobody is asked for predictions."""
        return super().kept_layers if self.predict else ()

    @property
    def predictor(self) -> PredictorConfig | None:
        """How it asks the predictor; None when it does not."""
        if not self.predict:
            return None
        return PredictorConfig(timeout_s=self.predictor_timeout_s, queue_samples=self.predictor_queue)

    @property
    def evacuation(self) -> EvacuationConfig:
        """What drains and shortages of blocks go by. With an instance that may move nothing away they ask in vain."""
        config = EvacuationConfig(relief_horizon_s=self.relief_horizon_s)
        moves = max(1, self.max_outgoing_migrations)
        rescheduling = replace(config.rescheduling, cost=self.cost, max_in_flight_per_source=moves)
        return replace(config, rescheduling=rescheduling)

    @property
    def migrator(self) -> MigratorConfig:
        """What its migrations go by."""
        return MigratorConfig(
            max_outgoing=self.max_outgoing_migrations,
            max_incoming=self.max_incoming_migrations,
            owner_ttl_s=self.owner_ttl_s,
        )
