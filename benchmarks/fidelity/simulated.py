"""Runs the simulator, and keeps what became of each request."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.fidelity.served import MOVED, Move, Run, Served
from starmesh.migration.terms import Cause
from starmesh.sim.cluster import Cluster
from starmesh.sim.config import SimulationConfig
from starmesh.sim.measurements import Measurements
from starmesh.sim.outcome import RequestOutcome
from starmesh.sim.run import run_simulation
from starmesh.types import Migration


class _Kept(Measurements):
    def __init__(self, config: SimulationConfig) -> None:
        super().__init__(config)
        self.outcomes: list[RequestOutcome] = []
        self.moves: list[Move] = []

    def finished(self, outcome: RequestOutcome) -> None:
        super().finished(outcome)
        self.outcomes.append(outcome)

    def migration_ended(
        self,
        migration: Migration,
        *,
        moved: bool,
        cause: Cause | None,
        duration_s: float,
        size_bytes: int,
        stood_still_s: float,
    ) -> None:
        super().migration_ended(
            migration,
            moved=moved,
            cause=cause,
            duration_s=duration_s,
            size_bytes=size_bytes,
            stood_still_s=stood_still_s,
        )
        outcome = MOVED if moved else cause.value if cause else "unknown"
        self.moves.append(Move(migration.request_id, migration.reason.value, outcome, duration_s, stood_still_s))


def simulate(config: SimulationConfig, *, prepare: Callable[[Cluster], None] | None = None) -> Run:
    """One run of ``config``; ``prepare`` as of ``run_simulation``."""
    kept = _Kept(config)
    result = run_simulation(config, measurements=kept, prepare=prepare)
    return Run(
        served=tuple(
            Served(
                request_id=outcome.request_id,
                prompt_tokens=outcome.prompt_tokens,
                output_tokens=outcome.output_tokens,
                asked_s=outcome.arrived_s,
                first_token_s=outcome.first_token_s,
                finished_s=outcome.finished_s,
                longest_gap_s=outcome.longest_gap_s,
                migrations=outcome.migrations,
            )
            for outcome in kept.outcomes
            if outcome.first_token_s is not None and outcome.finished_s is not None
        ),
        moves=tuple(kept.moves),
        preemptions=result.preemptions,
        unserved={outcome.request_id: "refused" for outcome in kept.outcomes if outcome.refused},
    )
