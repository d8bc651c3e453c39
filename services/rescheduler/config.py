"""Settings of the rescheduler."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

from pydantic import Field, field_validator

from starmesh.emulation.settings import EmulationSettings
from starmesh.policy.rescheduling import POLICIES, ReschedulingConfig

_DEFAULT: Final = ReschedulingConfig()
_LEAD_ROUNDS: Final = 3.0


class ReschedulerSettings(EmulationSettings):
    """When rounds take place, and what they decide by. Flags of the latter are fields of ``ReschedulingConfig``, which
    says where each default comes from."""

    # Our choice: a few load reports old at most, and many rounds within the life of a long request. Llumnix's too is
    # in seconds; the paper's is unknown.
    round_interval_s: float = Field(1.0, ge=0.05, description="seconds between rounds")
    record: Path | None = Field(None, description="file to append each round to, as a line of JSON to plan again")
    record_max_mib: int = Field(256, ge=1, description="MiB at which recording ends")

    policy: str = Field(_DEFAULT.policy, description=f"how requests are rebalanced: {', '.join(POLICIES)}")
    stale_after_s: float = Field(_DEFAULT.stale_after_s, gt=0, description="seconds after which a report is ignored")
    horizon_steps: int = Field(_DEFAULT.horizon_steps, ge=0, le=1 << 20, description="decode steps looked ahead")
    overload_margin: float = Field(_DEFAULT.overload_margin, ge=0, description="part above the mean that is overload")
    amortisation: float = Field(
        _DEFAULT.amortisation, ge=0, description="times its transfer that a sequence must still run to be moved"
    )
    hysteresis: float = Field(_DEFAULT.hysteresis, ge=0, description="times its cost that a move must gain")
    watermark: float = Field(_DEFAULT.watermark, ge=0, lt=1, description="part of a target's blocks to keep free")
    max_in_flight: int = Field(_DEFAULT.max_in_flight, ge=1, le=4096, description="migrations under way in the cluster")
    max_in_flight_per_source: int = Field(_DEFAULT.max_in_flight_per_source, ge=1, description="and from one instance")
    max_in_flight_per_target: int = Field(_DEFAULT.max_in_flight_per_target, ge=1, description="and to one instance")
    cool_down_s: float = Field(_DEFAULT.cool_down_s, ge=0, description="seconds that a moved sequence stays")
    settle_s: float = Field(_DEFAULT.settle_s, ge=0, description="seconds that both ends of a move rest from others")
    failure_cool_down_s: float = Field(
        _DEFAULT.failure_cool_down_s, ge=0, description="seconds that one stays after a failed move; doubled each time"
    )
    in_flight_timeout_s: float = Field(
        _DEFAULT.in_flight_timeout_s, ge=1, description="seconds after which a migration without an end has failed"
    )

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        if name not in POLICIES:
            raise ValueError(f"there is no policy {name!r}: use one of {', '.join(POLICIES)}")
        return name

    @field_validator("record")
    @classmethod
    def _writable(cls, path: Path | None) -> Path | None:
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"there is no directory {path.absolute().parent}")
        return path

    @property
    def lead_ttl_s(self) -> float:
        """How long the lead lasts without a round: as long as the registration, and for several rounds."""
        return max(self.lease_ttl_s, _LEAD_ROUNDS * self.round_interval_s)

    def rescheduling(self) -> ReschedulingConfig:
        """What ``plan`` decides by."""
        names = {field.name for field in dataclasses.fields(ReschedulingConfig)} & type(self).model_fields.keys()
        return dataclasses.replace(_DEFAULT, cost=self.cost, **{name: getattr(self, name) for name in names})
