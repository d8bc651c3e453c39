"""Lines of those that wait at an instance: first come first served, and the first is offered whenever that can help."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.sim.waiting_lines import WaitingLines

pytestmark = pytest.mark.fast


def test_the_second_is_offered_once_the_first_has_its_place() -> None:
    offered: list[str] = []
    lines = WaitingLines(offered.append)
    lines.join("d0", "a")
    lines.join("d0", "b")
    lines.join("d1", "c")
    assert offered == ["a", "c"]
    lines.taken("d0")
    assert offered == ["a", "c", "b"]


def test_a_refused_first_is_offered_again_when_something_has_ended() -> None:
    offered: list[str] = []
    lines = WaitingLines(offered.append)
    lines.join("d0", "a")
    lines.refused("d0")
    lines.freed("d1")
    lines.join("d0", "b")
    assert offered == ["a"]
    lines.freed("d0")
    assert offered == ["a", "a"]


def test_an_end_that_overtakes_the_refusal_is_not_missed() -> None:
    offered: list[str] = []
    lines = WaitingLines(offered.append)
    lines.join("d0", "a")
    lines.freed("d0")
    assert offered == ["a"]
    lines.refused("d0")
    assert offered == ["a", "a"]


def test_who_leaves_makes_way() -> None:
    offered: list[str] = []
    lines = WaitingLines(offered.append)
    for waiter in "abc":
        lines.join("d0", waiter)
    lines.refused("d0")
    lines.leave("d0", "b")
    assert offered == ["a"]
    lines.leave("d0", "a")
    lines.leave("d0", "a")
    assert offered == ["a", "c"]


@given(st.lists(st.sampled_from(["join", "end", "answer", "answer", "leave"]), max_size=60), st.data())
def test_nobody_waits_while_there_is_a_place(script: list[str], data: st.DataObject) -> None:
    """An instance of two places: whenever no offer is open, either nobody waits or both places are taken."""
    offered: list[int] = []
    lines = WaitingLines(offered.append)
    waiting: list[int] = []
    inside, number, served = 0, 0, list[int]()
    for action in script:
        if action == "join":
            waiting.append(number)
            lines.join("d0", number)
            number += 1
        elif action == "end" and inside:
            inside -= 1
            lines.freed("d0")
        elif action == "answer" and offered:
            waiter = offered.pop()
            assert waiter == waiting[0]
            if inside < 2:
                inside += 1
                served.append(waiting.pop(0))
                lines.taken("d0")
            else:
                lines.refused("d0")
        elif action == "leave" and waiting:
            gone = data.draw(st.sampled_from(waiting))
            waiting.remove(gone)
            if gone in offered:
                offered.remove(gone)
            lines.leave("d0", gone)
        assert len(offered) <= 1
        assert offered or not waiting or inside == 2
    assert served == sorted(served)
