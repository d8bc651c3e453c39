"""Steps on a clock that a test owns: errors do not add up, pauses are made up for as far as they should be."""

from __future__ import annotations

import logging

import pytest

from starmesh.emulation.pace import MAX_BACKLOG_S, REPORT_INTERVAL_S, UNNOTICED_S, StepPace

pytestmark = pytest.mark.fast


class Machine:
    """Time that passes when asked to; each sleep takes ``oversleep_s`` longer."""

    def __init__(self, oversleep_s: float = 0.0) -> None:
        self.now_s = 100.0
        self.oversleep_s = oversleep_s

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds + self.oversleep_s

    def pace(self) -> StepPace:
        return StepPace(clock=self.clock, sleep=self.sleep)


def run(machine: Machine, pace: StepPace, steps: int, step_s: float, between_s: float = 0.0) -> None:
    """A busy engine that takes ``between_s`` of its own for each step."""
    for _ in range(steps):
        machine.now_s += between_s
        pace.begin(busy=True)
        pace.wait(step_s)


def test_oversleeping_and_work_between_steps_do_not_add_up() -> None:
    machine = Machine(oversleep_s=0.0003)
    pace = machine.pace()
    run(machine, pace, 1000, 0.010, between_s=0.002)
    assert machine.now_s == pytest.approx(100.0 + 10.0 + 0.0003)
    assert pace.lost_s == 0.0


def test_a_pause_is_made_up_for() -> None:
    machine = Machine()
    pace = machine.pace()
    run(machine, pace, 10, 0.010)
    machine.now_s += MAX_BACKLOG_S * 0.9
    run(machine, pace, 90, 0.010)
    assert machine.now_s == pytest.approx(101.0)
    assert pace.lost_s == 0.0


def test_what_is_more_is_lost_and_told(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    pace = machine.pace()
    run(machine, pace, 1, 0.010)
    machine.now_s += 5.0
    run(machine, pace, 100, 0.010)
    assert pace.lost_s == pytest.approx(5.0 - MAX_BACKLOG_S)
    with caplog.at_level(logging.WARNING):
        run(machine, pace, int(REPORT_INTERVAL_S / 0.010), 0.010)
    assert "lower --speed" in caplog.text
    assert pace.lost_s == 0.0


def test_an_engine_that_was_idle_makes_nothing_up() -> None:
    machine = Machine()
    pace = machine.pace()
    run(machine, pace, 3, 0.010)
    machine.now_s += 7.0
    pace.begin(busy=False)
    began_s = machine.now_s
    pace.wait(0.010)
    assert machine.now_s == pytest.approx(began_s + 0.010)


def test_prompts_that_wait_for_each_other_keep_it_busy() -> None:
    machine = Machine(oversleep_s=0.0003)
    pace = machine.pace()
    for _ in range(100):
        machine.now_s += UNNOTICED_S / 2
        pace.begin(busy=False)
        pace.wait(0.010)
    assert machine.now_s == pytest.approx(101.0 + 0.0003)
