"""What happens when on virtual time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.sim.events import EventLoop

pytestmark = pytest.mark.fast


def run(loop: EventLoop) -> None:
    while loop.turn():
        pass


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans())))
def test_events_happen_by_time_then_order_then_as_asked_for(asked: list[tuple[int, int, bool]]) -> None:
    loop, happened = EventLoop(), []
    events = [
        loop.at(float(when), lambda number=number: happened.append((loop.now_s, number)), order=order)  # type: ignore[misc]
        for number, (when, order, _) in enumerate(asked)
    ]
    for event, (_, _, cancelled) in zip(events, asked, strict=True):
        if cancelled:
            event.cancel()
    run(loop)
    expected = sorted((when, order, number) for number, (when, order, cancelled) in enumerate(asked) if not cancelled)
    assert happened == [(when, number) for when, _, number in expected]
    assert loop.next_s is None


def test_an_event_of_this_moment_that_is_asked_for_in_it_happens_by_its_order() -> None:
    loop, happened = EventLoop(), []
    loop.at(1.0, lambda: happened.append("last"), order=2)

    def ask() -> None:
        happened.append("first")
        loop.at(1.0, lambda: happened.append("second"))

    loop.at(1.0, ask, order=1)
    run(loop)
    assert happened == ["first", "second", "last"]


def test_the_past_is_refused() -> None:
    loop = EventLoop()
    loop.at(2.0, lambda: None)
    assert loop.turn()
    with pytest.raises(ValueError, match="past"):
        loop.at(1.0, lambda: None)
    with pytest.raises(ValueError, match="past"):
        loop.after(-0.5, lambda: None)


def test_a_cancelled_event_is_not_waited_for() -> None:
    loop = EventLoop()
    event = loop.at(1.0, lambda: pytest.fail("cancelled"))
    loop.at(3.0, lambda: None)
    event.cancel()
    event.cancel()
    assert loop.next_s == 3.0
    assert loop.turn()
    assert not loop.turn()
    assert loop.now_s == 3.0


def test_what_has_passed_is_told_by_time_and_by_the_highest_order_that_has_been_reached() -> None:
    loop, seen = EventLoop(), []

    def look() -> None:
        seen.append([loop.passed(1.0, 9), *(loop.passed(2.0, order) for order in range(4)), loop.passed(3.0, 0)])

    def look_again() -> None:
        look()
        loop.at(2.0, look)  # its order is 0, but those up to 2 are over

    loop.at(2.0, look)
    loop.at(2.0, look_again, order=2)
    run(loop)
    assert seen == [
        [True, True, False, False, False, False],
        [True, True, True, True, False, False],
        [True, True, True, True, False, False],
    ]
    loop.at(3.0, lambda: seen.append([loop.passed(3.0, 0), loop.passed(3.0, 1)]))
    run(loop)
    assert seen[-1] == [True, False]
