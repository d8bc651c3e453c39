"""Admission: the arithmetic of room, and the queue of those that wait for it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from starmesh.policy.admission import AdmissionConfig, AdmissionQueue, Need, Room, Waiting, lacking_tokens

from .views import instance, prefill

pytestmark = pytest.mark.fast

CONFIG = AdmissionConfig(headroom_tokens=32, watermark=0.0)


@pytest.mark.parametrize(
    ("tokens", "remaining", "decode", "prefill_tokens"),
    [
        (1, 100, 48, 16),  # 1 + 1 + 32 = 34
        (15, 100, 48, 16),
        (16, 100, 64, 16),  # 49
        (16, 1, 32, 16),  # the next token is the last: 17
        (16, 0, 32, 16),
        (15, 1, 16, 16),
        (15, 5, 32, 16),  # 15 + 1 + 4 = 20
        (1590, 100, 1600, 1600),  # all there is
    ],
)
def test_reserve_tokens(tokens: int, remaining: int, decode: int, prefill_tokens: int) -> None:
    need = Need(tokens, remaining)
    assert Room(instance("d0"), CONFIG).reserve_tokens(need) == decode
    assert Room(prefill(), CONFIG).reserve_tokens(need) == prefill_tokens


def test_a_full_sequence_fits_a_prefill_but_leaves_no_token_to_decode() -> None:
    need = Need(1600, 1)
    assert Room(prefill(), CONFIG).fits(need)
    assert not Room(instance("d0"), CONFIG).fits(need)


def test_free_tokens_count_what_is_reserved_and_what_is_lacking() -> None:
    busy = instance("d0", free_blocks=50, running=1, lacking_tokens=30, reserved=(100, 20))
    assert lacking_tokens(busy) == 30
    assert Room(busy, CONFIG).free_tokens == 800 - 30 - 120


def test_watermark_is_kept_for_those_that_are_there() -> None:
    need = Need(100, 0)  # 7 blocks
    cautious = AdmissionConfig(headroom_tokens=0, watermark=0.1)
    assert Room(instance("d0", free_blocks=17, running=1), cautious).has_room(need)
    assert not Room(instance("d0", free_blocks=16, running=1), cautious).has_room(need)
    assert Room(instance("d0", free_blocks=7), cautious).has_room(need)


def test_an_instance_that_has_not_reported_has_room_for_one_long_sequence() -> None:
    silent = instance("d0", reported_at_s=None, reserved=(1500,))
    assert Room(silent, CONFIG).free_tokens == 100
    assert Room(instance("d0", reported_at_s=None), CONFIG).has_room(Need(1590, 5))
    assert Room(instance("d0", layout=None), CONFIG).limit_tokens == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdmissionConfig(headroom_tokens=-1),
        lambda: AdmissionConfig(watermark=1.0),
        lambda: Need(0, 1),
        lambda: Need(1, -1),
    ],
)
def test_refuses_what_makes_no_sense(make: object) -> None:
    with pytest.raises(ValueError):
        make()  # type: ignore[operator]


@given(st.integers(1, 2000), st.integers(0, 2000), st.integers(0, 100), st.integers(0, 100))
def test_reservations_are_whole_blocks_and_enough(tokens: int, remaining: int, total: int, headroom: int) -> None:
    room = Room(
        instance("d0", total_blocks=total, free_blocks=total, max_sequence_tokens=0),
        AdmissionConfig(headroom_tokens=headroom),
    )
    need = Need(tokens, remaining)
    reserved = room.reserve_tokens(need)
    if room.fits(need):
        assert reserved % 16 == 0
        assert tokens + 1 <= reserved <= room.limit_tokens
        assert reserved < tokens + 1 + headroom + 16


def test_queue_order() -> None:
    queue = AdmissionQueue(10)
    for request_id, priority in (("a", 0), ("b", 5), ("c", 0), ("d", -1), ("e", 5)):
        assert queue.push(Waiting(request_id, deadline_s=9, priority=priority), 0)
    assert [waiting.request_id for waiting in queue] == ["b", "e", "a", "c", "d"]
    with pytest.raises(ValueError, match="waits already"):
        queue.push(Waiting("a", 9), 0)


def test_queue_takes_nobody_whose_time_is_over() -> None:
    queue = AdmissionQueue(10)
    assert not queue.push(Waiting("late", deadline_s=5), 5)
    assert queue.next_deadline_s is None and queue.pop(5) is None


def test_retry_delay_follows_the_rate_of_departures() -> None:
    queue = AdmissionQueue(100)
    assert queue.retry_delay_s(0) == 0.5
    for i in range(100):
        queue.push(Waiting(f"r{i}", deadline_s=1e9), 0)
    for turn in range(1, 61):
        queue.pop(turn * 0.1)
    assert queue.retry_delay_s(6.0) == pytest.approx(40 * 0.1, rel=0.05)
    assert queue.retry_delay_s(6.5) == pytest.approx(40 * 0.5), "nothing has left for half a second"
    assert queue.retry_delay_s(600) == 30


class QueueMachine(RuleBasedStateMachine):
    """The queue against a plain list that is sorted each time."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = AdmissionQueue(5)
        self.model: list[Waiting] = []
        self.now_s = 0.0
        self.made = 0

    def ordered(self) -> list[Waiting]:
        return sorted(self.model, key=lambda waiting: -waiting.priority)

    @rule(priority=st.integers(-1, 1), life_s=st.integers(-1, 5))
    def push(self, priority: int, life_s: int) -> None:
        self.made += 1
        waiting = Waiting(f"r{self.made}", self.now_s + life_s, priority)
        accepted = len(self.model) < 5 and life_s > 0
        assert self.queue.push(waiting, self.now_s) == accepted
        if accepted:
            self.model.append(waiting)

    @rule()
    def pop(self) -> None:
        expected = self.ordered()[0] if self.model else None
        assert self.queue.pop(self.now_s) == expected
        if expected is not None:
            self.model.remove(expected)

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        request_id = f"r{data.draw(st.integers(1, self.made))}"
        present = [waiting for waiting in self.model if waiting.request_id == request_id]
        assert self.queue.remove(request_id) == bool(present)
        self.model = [waiting for waiting in self.model if waiting not in present]

    @rule(seconds=st.integers(0, 3))
    def expire(self, seconds: int) -> None:
        self.now_s += seconds
        over = [waiting for waiting in self.ordered() if waiting.deadline_s <= self.now_s]
        assert list(self.queue.expire(self.now_s)) == over
        self.model = [waiting for waiting in self.model if waiting not in over]

    @invariant()
    def agrees(self) -> None:
        assert list(self.queue) == self.ordered()
        assert len(self.queue) == len(self.model) <= 5
        assert self.queue.next_deadline_s == min((waiting.deadline_s for waiting in self.model), default=None)
        assert 0.5 <= self.queue.retry_delay_s(self.now_s) <= 30


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=40, stateful_step_count=30)
