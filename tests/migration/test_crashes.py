"""kill -9 of either end, of both, and the loss of the ledger, at every state of either end, on virtual time."""

from __future__ import annotations

from itertools import product

import pytest

from starmesh.migration.source_record import SourceState
from starmesh.migration.target_record import TargetState
from tests.migration.crashes import STATES, Loss, State, run_crash

POINTS: tuple[tuple[State, Loss], ...] = tuple(product(STATES.values(), Loss))
"""Ends too: what has just moved, or stayed, may be lost as well."""
SEEDS_PER_POINT = 2
QUICK = (Loss.BOTH, Loss.LEDGER_ENTRIES)
LOSSES = [pytest.param(loss, marks=pytest.mark.fast if loss in QUICK else (), id=loss.value) for loss in Loss]
"""The fast lane has two of them."""


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_at_every_state(loss: Loss) -> None:
    """Every stream is complete and exact, and nothing of a migration is left anywhere. Each run has a seed of its own,
    and each must have come to its point: a state that no migration reaches any more is told, not passed over."""
    hit = []
    for number, (at, lost) in enumerate(POINTS):
        if lost is loss:
            runs = [run_crash(number * SEEDS_PER_POINT + seed, at=at, loss=loss) for seed in range(SEEDS_PER_POINT)]
            hit += [run.hit for run in runs]
    expected = [(at, loss) for at in STATES.values() for _ in range(SEEDS_PER_POINT)]
    assert hit == expected


@pytest.mark.fast
def test_a_run_is_its_seed() -> None:
    """What a seed has shown once it shows again: the log of a run is the same, line for line."""
    first, second = (run_crash(3, at=SourceState.COMMITTING, loss=Loss.TARGET) for _ in range(2))
    assert first.log == second.log
    assert first.timeline.now_s == second.timeline.now_s


@pytest.mark.fast
def test_a_failing_run_names_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.migration.crashes.MAX_TURNS", 5)
    with pytest.raises(AssertionError, match=r"replay 7 --at target:CLAIMING --lose both"):
        run_crash(7, at=TargetState.CLAIMING, loss=Loss.BOTH)
