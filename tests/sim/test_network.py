"""Links on virtual time: who gets how much of them, and what a death leaves of it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.profiles import Link
from starmesh.sim.events import EventLoop
from starmesh.sim.network import ROUTER, Network, Transfer
from starmesh.sim.owners import LEDGER_S, Owners
from starmesh.sim.pull import Pull
from starmesh.types import Ownership

pytestmark = pytest.mark.fast

LINK = Link(100.0, 0.01)
NAMES = ("a", "b", "c")


class Ends:
    """A network of three instances, and when what ended how."""

    def __init__(self, links: dict[str, Link] | None = None) -> None:
        self.loop = EventLoop()
        self.network = Network(self.loop)
        self.ended: dict[str, tuple[float, bool]] = {}
        for name in NAMES:
            self.network.add(name, (links or {}).get(name, LINK))

    def send(self, name: str, sender_id: str, receiver_id: str, size_bytes: int) -> Transfer:
        """Begin a transfer of this name."""

        def done(arrived: bool) -> None:
            assert name not in self.ended
            self.ended[name] = (self.loop.now_s, arrived)

        return self.network.transfer(sender_id, receiver_id, size_bytes, done)

    def run(self) -> None:
        while self.loop.turn():
            pass


def test_a_transfer_alone_has_the_slower_link() -> None:
    ends = Ends({"b": Link(50.0, 0.0)})
    ends.send("x", "a", "b", 200)
    ends.run()
    assert ends.ended == {"x": (4.0, True)}


@pytest.mark.parametrize("other", [("a", "c"), ("c", "b")])
def test_contention_at_either_end_halves_the_bandwidth(other: tuple[str, str]) -> None:
    ends = Ends()
    first, second = ends.send("x", "a", "b", 200), ends.send("y", *other, 200)
    assert (first.bytes_per_s, second.bytes_per_s) == (50.0, 50.0)
    ends.run()
    assert ends.ended == {"x": (4.0, True), "y": (4.0, True)}


def test_both_ways_of_a_link_are_apart() -> None:
    ends = Ends()
    ends.send("x", "a", "b", 200)
    ends.send("y", "b", "a", 200)
    ends.run()
    assert ends.ended == {"x": (2.0, True), "y": (2.0, True)}


def test_what_ends_or_is_broken_off_leaves_its_share_to_the_others() -> None:
    ends = Ends()
    ends.send("x", "a", "b", 300)
    ends.send("y", "a", "c", 50)
    third = ends.send("z", "c", "b", 1000)
    ends.loop.at(2.0, third.cancel)
    ends.run()
    # x: 50 a second for 2 s beside z, then 100.
    assert ends.ended == {"y": (1.0, True), "x": (4.0, True)}
    third.cancel()


def test_a_death_ends_its_transfers_and_frees_the_links_of_the_others() -> None:
    ends = Ends()
    ends.send("x", "a", "b", 200)
    ends.send("y", "a", "c", 200)
    ends.send("z", "c", "a", 200)
    ends.loop.at(1.0, lambda: ends.network.remove("c"))
    ends.run()
    assert ends.ended == {"y": (1.0, False), "z": (1.0, False), "x": (2.5, True)}


def test_messages_take_the_slower_ends_latency_and_keep_their_order() -> None:
    ends = Ends({"b": Link(1.0, 0.5)})
    told: list[tuple[str, float]] = []
    for name in ("first", "second"):
        ends.network.message("a", "b", lambda name=name: told.append((name, ends.loop.now_s)))  # type: ignore[misc]
    ends.network.message(ROUTER, "a", lambda: told.append(("router", ends.loop.now_s)))
    ends.run()
    assert told == [("router", 0.01), ("first", 0.5), ("second", 0.5)]


def test_a_message_to_the_dead_is_lost_but_what_the_dead_have_sent_arrives() -> None:
    ends = Ends()
    told: list[str] = []
    ends.network.message("a", "b", lambda: told.append("to b"), lost=lambda: told.append("lost"))
    ends.network.message("b", "a", lambda: told.append("from b"))
    ends.network.remove("b")
    ends.network.message("b", "a", lambda: told.append("from beyond"))
    ends.network.message("a", "b", lambda: told.append("to nobody"), lost=lambda: told.append("lost too"))
    ends.network.add("b", LINK)  # another one: nothing of this is for it
    ends.run()
    assert told == ["lost", "from b", "lost too"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from(NAMES), st.sampled_from(NAMES), st.integers(1, 1000)),
        max_size=12,
    )
)
def test_transfers_end_as_a_fluid_that_is_computed_plainly(asked: list[tuple[int, str, str, int]]) -> None:
    ends = Ends({"c": Link(30.0, 0.0)})
    flows = [(start / 4, s, r, size) for start, s, r, size in asked if s != r]
    for number, (start_s, sender_id, receiver_id, size_bytes) in enumerate(flows):
        ends.loop.at(start_s, lambda n=number, s=sender_id, r=receiver_id, b=size_bytes: ends.send(str(n), s, r, b))
    ends.run()
    assert {int(name): ended[0] for name, ended in ends.ended.items()} == pytest.approx(fluid(flows))


def fluid(flows: list[tuple[float, str, str, int]]) -> dict[int, float]:
    """When each ends, all rates computed anew between any two events."""
    bandwidth = {"a": 100.0, "b": 100.0, "c": 30.0}
    now_s, ended = 0.0, dict[int, float]()
    left = {number: float(flow[3]) for number, flow in enumerate(flows)}
    while len(ended) < len(flows):
        begun = [number for number in left if flows[number][0] <= now_s]
        out, into = Counter(flows[n][1] for n in begun), Counter(flows[n][2] for n in begun)
        rates = {
            n: min(bandwidth[flows[n][1]] / out[flows[n][1]], bandwidth[flows[n][2]] / into[flows[n][2]]) for n in begun
        }
        next_s = min([now_s + left[n] / rates[n] for n in begun] + [flow[0] for flow in flows if flow[0] > now_s])
        for number in begun:
            ends_s = now_s + left[number] / rates[number]
            left[number] -= rates[number] * (next_s - now_s)
            if ends_s <= next_s + 1e-12:
                ended[number] = ends_s
                del left[number]
        now_s = next_s
    return ended


def test_a_pull_is_a_request_the_bytes_and_a_confirmation() -> None:
    ends = Ends()
    told: list[tuple[float, bool]] = []
    Pull(
        ends.network,
        holder_id="a",
        puller_id="b",
        size_bytes=100,
        confirm=lambda: True,
        done=lambda arrived: told.append((ends.loop.now_s, arrived)),
    )
    ends.run()
    assert told == [(pytest.approx(0.01 + 1.0 + 0.02), True)]


@pytest.mark.parametrize("dies_s", [0.005, 0.5, 1.015])
def test_a_pull_from_one_that_dies_fails(dies_s: float) -> None:
    ends = Ends()
    told: list[bool] = []
    Pull(ends.network, holder_id="a", puller_id="b", size_bytes=100, confirm=lambda: True, done=told.append)
    ends.loop.at(dies_s, lambda: ends.network.remove("a"))
    ends.run()
    assert told == [False]


@pytest.mark.parametrize("at_s", [0.005, 0.5, 1.015, 1.025, 2.0])
def test_a_pull_that_is_broken_off_tells_nothing_and_leaves_the_link(at_s: float) -> None:
    ends = Ends()
    told: list[bool] = []
    pull = Pull(ends.network, holder_id="a", puller_id="b", size_bytes=100, confirm=lambda: True, done=told.append)
    ends.loop.at(at_s, pull.cancel)
    ends.loop.at(at_s, lambda: ends.send("x", "a", "b", 100))
    ends.run()
    assert told == ([True] if at_s == 2.0 else [])
    assert ends.ended["x"] == (at_s + 1.0, True)


def test_one_of_two_claims_that_expect_the_same_owner_is_done() -> None:
    loop = EventLoop()
    owners = Owners(loop)
    owners.assign("q", "a", 3)
    told: list[tuple[float, str, Ownership | None]] = []
    for name, new in (("target", Ownership("b", 4)), ("source", Ownership("a", 5))):
        owners.claim(
            "q",
            Ownership("a", 3),
            new,
            lambda answer, name=name: told.append((loop.now_s, name, answer.owner)),  # type: ignore[misc]
        )
    owners.claim("q", Ownership("b", 4), Ownership("c", 9), lambda answer: None).cancel()
    owners.ask("q", lambda answer: told.append((loop.now_s, "asked", answer.owner)), at_s=1.0)
    while loop.turn():
        pass
    moved = Ownership("b", 4)
    assert told == [(LEDGER_S, "target", moved), (LEDGER_S, "source", moved), (1.0 + LEDGER_S, "asked", moved)]
    with pytest.raises(ValueError, match="does not follow"):
        owners.assign("q", "a", 4)
    owners.disown("q", 3)
    assert owners.owner("q") == moved
    owners.disown("q")
    assert len(owners) == 0
