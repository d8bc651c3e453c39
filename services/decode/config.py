"""Settings of a decode instance."""

from dataclasses import dataclass, field, replace

from pydantic import Field

from starmesh.instance.settings import EngineSettings
from starmesh.ledger.limits import OWNER_TTL_S
from starmesh.migration.terms import Limits
from starmesh.policy.rescheduling import ReschedulingConfig

MAX_MIGRATIONS = 4


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

    @property
    def evacuation(self) -> EvacuationConfig:
        """What drains and shortages of blocks go by. With an instance that may move nothing away they ask in vain."""
        config = EvacuationConfig(relief_horizon_s=self.relief_horizon_s)
        moves = max(1, self.max_outgoing_migrations)
        return replace(config, rescheduling=replace(config.rescheduling, max_in_flight_per_source=moves))

    @property
    def migrator(self) -> MigratorConfig:
        """What its migrations go by."""
        return MigratorConfig(
            max_outgoing=self.max_outgoing_migrations,
            max_incoming=self.max_incoming_migrations,
            owner_ttl_s=self.owner_ttl_s,
        )
