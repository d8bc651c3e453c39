"""What a simulation is of: one frozen value, which with the code decides every event of the run.

Owns the values and their defaults; ``strategies`` names the combinations of policies that are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from starmesh.policy.admission import AdmissionConfig
from starmesh.profiles import Profile, ProfileError
from starmesh.sim.workload import WorkloadConfig
from starmesh.types import Role


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count for goodput: first token within ``ttft_s``, mean TPOT within ``tpot_s``."""

    ttft_s: float
    tpot_s: float


class FaultKind(Enum):
    """What happens to an instance."""

    DIE = "die"
    JOIN = "join"
    """Another instance of the role starts, empty."""
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Fault:
    """``instance_id`` dies, joins or drains at ``at_s``."""

    at_s: float
    kind: FaultKind
    instance_id: str
    role: Role = Role.DECODE


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """How requests are placed and moved: names of policies, and what is known of the future.

    ``dispatch`` and ``rescheduling`` are names in the registries of ``policy``; ``predictor`` is one in ``predictors``.
    ``admit_all`` places a request at once, whatever memory is free: what finds none waits, once it is prefilled, at the
    decode instance that was chosen for it, first come first served. ``perfect_balance`` asks for the bound instead: all
    instances as one that shares its load without rest.
    """

    name: str
    dispatch: str = "least_tokens"
    rescheduling: str = "none"
    predictor: str = "none"
    admit_all: bool = False
    perfect_balance: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """One run. Seconds are of virtual time.

    ``warm_up_s``, ``measure_until_s``: requests that arrive before the one or after the other are served, but not
    measured. ``round_interval_s`` is the rescheduler's, ``report_interval_s`` the instances' (0.25 s live).
    ``queue_length`` and ``queue_timeout_s`` bound the router's queue, by default as they do live. ``every_step`` asks
    for the plain path, which makes each step by itself; the result is the same.
    """

    profile: Profile
    strategy: Strategy
    workload: WorkloadConfig
    prefill_instances: int = 1
    decode_instances: int = 3
    seed: int = 0
    warm_up_s: float = 0.0
    measure_until_s: float | None = None
    round_interval_s: float = 1.0
    report_interval_s: float = 0.25
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    queue_length: int = 1024
    queue_timeout_s: float = 30.0
    slos: tuple[Slo, ...] = (Slo(2.0, 0.05), Slo(5.0, 0.1))
    faults: tuple[Fault, ...] = ()
    every_step: bool = False

    def __post_init__(self) -> None:
        if min(self.prefill_instances, self.decode_instances) < 1:
            raise ProfileError("a cluster needs at least one prefill and one decode instance")
        if min(self.round_interval_s, self.report_interval_s) <= 0:
            raise ProfileError("round_interval_s and report_interval_s are above 0")

    def instance_id(self, role: Role, number: int) -> str:
        """What the instance ``number`` of a role is called, from 0 on; as long as all others, so that their order by id
        is that by number."""
        width = len(str(max(self.prefill_instances, self.decode_instances) - 1))
        return f"{role.value}-{number:0{width}}"
