"""A prefilled sequence comes to its decode instance, or does not."""

from __future__ import annotations

import dataclasses

import pytest

from starmesh.engine.scheduler import UnknownRequest
from starmesh.sim.handoff import Handoff, Handoffs
from starmesh.sim.token_count import counted_spec
from starmesh.types import SamplingParams, SequenceSpec
from tests.sim.moving import BLOCK_TOKENS, PROFILE, MovingCluster

pytestmark = pytest.mark.fast

LINK = PROFILE.link
PROMPT_TOKENS = 200
BLOCKS = -(-PROMPT_TOKENS // BLOCK_TOKENS)
PULL_S = 3 * LINK.latency_s + BLOCKS * PROFILE.layout.block_bytes / LINK.bytes_per_s


class Prefilled:
    """d0 holds a prompt's KV, and ``spec`` is what is to go on at d1 from 1 s on."""

    def __init__(self, *, total_blocks: int = PROFILE.total_blocks) -> None:
        self.cluster = MovingCluster(dataclasses.replace(PROFILE, total_blocks=total_blocks))
        cluster = self.cluster
        self.told: list[tuple[float, bool]] = []
        self.handoff: Handoff
        self.handoffs = Handoffs(cluster.network, cluster.instances, profile=cluster.profile)
        cluster._total_tokens["q"] = PROMPT_TOKENS + 20
        self.spec = self._spec(output_tokens=0)
        cluster.instances["d0"].call(lambda core: core.add(self.spec, hold=True))
        cluster.loop.at(1.0, self.hand_off)

    def hand_off(self) -> None:
        """To d1."""
        self.handoff = self.handoffs.start(
            "d0", "d1", self._spec(output_tokens=1), lambda done: self.told.append((self.cluster.loop.now_s, done))
        )

    def run(self, until_s: float) -> None:
        while (next_s := self.cluster.loop.next_s) is not None and next_s <= until_s:
            self.cluster.loop.turn()

    def free_blocks(self, instance_id: str) -> int:
        return self.cluster.instances[instance_id].core.load().free_blocks

    def held(self) -> bool:
        try:
            self.cluster.instances["d0"].core.held("q")
        except UnknownRequest:
            return False
        return True

    def _spec(self, *, output_tokens: int) -> SequenceSpec:
        return counted_spec(
            "q",
            3,
            prompt_tokens=PROMPT_TOKENS,
            output_tokens=output_tokens,
            sampling=SamplingParams(max_output_tokens=20),
        )


def test_it_takes_the_start_message_and_the_pull_and_the_prefill_instance_is_free_then() -> None:
    prefilled = Prefilled()
    prefilled.run(1.01)
    assert prefilled.told == [(pytest.approx(1.0 + LINK.latency_s + PULL_S), True)]
    assert not prefilled.held()
    assert prefilled.free_blocks("d0") == PROFILE.total_blocks
    progress = prefilled.cluster.instances["d1"].core.progress("q")
    assert progress.tokens >= PROMPT_TOKENS + 1
    prefilled.handoff.cancel()  # too late
    assert prefilled.cluster.instances["d1"].core.progress("q")


def test_an_instance_without_room_says_so_and_the_kv_waits() -> None:
    prefilled = Prefilled(total_blocks=20)
    prefilled.cluster.place("other", 150, 100, "d1")
    prefilled.run(1.2)
    assert [done for _, done in prefilled.told] == [False]
    assert prefilled.held()
    prefilled.cluster.loop.at(3.0, prefilled.hand_off)  # the other has ended by then
    prefilled.run(3.1)
    assert [done for _, done in prefilled.told] == [False, True]
    assert not prefilled.held()


def test_an_instance_that_is_not_there_refuses() -> None:
    prefilled = Prefilled()
    prefilled.cluster.loop.at(0.9, lambda: prefilled.cluster.kill("d1"))
    prefilled.run(2.0)
    assert [done for _, done in prefilled.told] == [False]
    assert prefilled.held()


@pytest.mark.parametrize("after_s", [0.5 * LINK.latency_s, 0.5 * PULL_S, LINK.latency_s + PULL_S - 1e-5])
def test_one_that_is_given_up_leaves_nothing_at_the_decode_instance(after_s: float) -> None:
    prefilled = Prefilled()
    prefilled.run(1.0)
    prefilled.cluster.loop.at(1.0 + after_s, prefilled.handoff.cancel)
    prefilled.run(2.0)
    assert prefilled.told == []
    assert prefilled.free_blocks("d1") == PROFILE.total_blocks


@pytest.mark.parametrize("dies", ["d0", "d1"])
def test_the_router_hears_of_a_death_by_itself(dies: str) -> None:
    prefilled = Prefilled()

    def die() -> None:
        prefilled.cluster.kill(dies)
        prefilled.handoff.cancel()

    prefilled.cluster.loop.at(1.0 + 0.5 * PULL_S, die)
    prefilled.run(2.0)
    assert prefilled.told == []
    for instance_id in prefilled.cluster.instances:
        free_blocks = PROFILE.total_blocks - (BLOCKS if instance_id == "d0" else 0)
        assert prefilled.free_blocks(instance_id) == free_blocks
