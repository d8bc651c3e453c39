"""Simulated sequences move by the live tables: what it costs, what stops it, and that nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.migration.source_record import SourceState
from starmesh.migration.target_record import TargetState
from starmesh.migration.terms import Cause
from starmesh.profiles import Link
from starmesh.sim.migrations import MAX_MIGRATIONS
from starmesh.sim.owners import LEDGER_S
from starmesh.types import Migration, MigrationReason
from tests.sim.moving import BLOCK_TOKENS, PROFILE, MovingCluster, random_cluster, run_seed

BLOCK_BYTES = PROFILE.layout.block_bytes
SLOW = dataclasses.replace(PROFILE, link=Link(1e6, 1e-3))
"""A block takes three steps."""
SEEDS = 20
CAUSES = {None, Cause.TARGET_SILENT, Cause.REFUSED, Cause.FINISHED, Cause.PREEMPTED, Cause.OUTGROWN}
"""What the seeds together must have met."""


def moving(cluster: MovingCluster, prompt_tokens: int = 100, output_tokens: int = 400, *, at_s: float = 0.5) -> None:
    """One long sequence on d0, which is to go to d1 at ``at_s``."""
    cluster.place("q", prompt_tokens, output_tokens, "d0")
    cluster.loop.at(at_s, lambda: cluster.move("q", "d1"))


def states(cluster: MovingCluster) -> tuple[SourceState | None, TargetState | None]:
    """Where the ends of q's migration stand; None for one that there is not."""
    source = cluster.migrations._moving.get("q")
    target = cluster.migrations._incoming.under_way("d1", "q")
    return (None if source is None else source[1].end.state, None if target is None else target.end.state)


@pytest.mark.fast
def test_a_move_costs_its_bytes_and_a_gap_of_the_tail_the_messages_and_the_claim() -> None:
    cluster = MovingCluster()
    moving(cluster)
    cluster.run()
    cluster.check_at_rest()
    assert [moved for _, moved, _ in cluster.ends] == [True]
    assert cluster.requests["q"].instance_id == "d1"
    assert cluster.requests["q"].epoch == 4
    # Commit, the pull's request, its end and the word on that, and the answer.
    messages_s = 5 * PROFILE.link.latency_s
    tail_s = cluster.stood_still_s[0] - messages_s - LEDGER_S
    tail_blocks = tail_s * PROFILE.link.bytes_per_s / BLOCK_BYTES
    assert tail_blocks == pytest.approx(round(tail_blocks))
    assert 1 <= round(tail_blocks) <= 3
    # All tokens that d0 has made but the last have KV.
    resident_tokens = 100 + cluster.every[0].core.load().output_tokens - 1
    assert cluster.size_bytes == [-(-resident_tokens // BLOCK_TOKENS) * BLOCK_BYTES]


@pytest.mark.fast
@pytest.mark.parametrize("prompt_tokens", [10, 1000, 4000])
def test_the_gap_does_not_grow_with_the_sequence(prompt_tokens: int) -> None:
    cluster = MovingCluster()
    moving(cluster, prompt_tokens, 60)
    cluster.run()
    cluster.check_at_rest()
    assert cluster.ends[0][1]
    assert cluster.stood_still_s[0] <= 5 * PROFILE.link.latency_s + LEDGER_S + 3 * BLOCK_BYTES / 1e8
    assert cluster.size_bytes[0] >= prompt_tokens // BLOCK_TOKENS * BLOCK_BYTES


@pytest.mark.fast
def test_two_moves_over_one_link_take_twice_as_long() -> None:
    def took_s(*targets: str) -> float:
        cluster = MovingCluster(dataclasses.replace(PROFILE, link=Link(1e7, 1e-5)))
        for number, target_id in enumerate(targets):
            cluster.place(f"q{number}", 1000, 300, "d0")
            cluster.loop.at(1.0, lambda n=number, t=target_id: cluster.move(f"q{n}", t))  # type: ignore[misc]
        cluster.run()
        cluster.check_at_rest()
        assert all(moved for _, moved, _ in cluster.ends)
        return max(cluster.durations_s)

    assert took_s("d1", "d2") == pytest.approx(2 * took_s("d1"), rel=0.15)  # but for waits for steps


@pytest.mark.fast
@pytest.mark.parametrize("dies", ["d0", "d1"])
def test_either_end_dies_at_any_moment(dies: str) -> None:
    """At each event of a migration, and between any two: the request is answered whole, by one owner at a time."""
    undisturbed = MovingCluster()
    moving(undisturbed)
    undisturbed.run(until_s=0.5)
    moments = [undisturbed.loop.now_s]
    while states(undisturbed) != (None, None):
        undisturbed.loop.turn()
        moments.append(undisturbed.loop.now_s)
    met: set[SourceState | TargetState | None] = set()
    for before_s, at_s in itertools.pairwise(moments):
        for when_s in {(before_s + at_s) / 2, at_s}:
            cluster = MovingCluster()
            moving(cluster)
            cluster.run(until_s=when_s)
            met.update(states(cluster))
            cluster.kill(dies)
            cluster.run()
            cluster.check_at_rest()
            assert len(cluster.ends) == 1
    assert met >= {SourceState.RESERVING, SourceState.COPYING, SourceState.FREEZING, SourceState.COMMITTING}
    assert met >= {TargetState.RESERVED, TargetState.PULLING, TargetState.PULLING_TAIL, TargetState.CLAIMING}
    assert TargetState.STARTED in met


def run_until(cluster: MovingCluster, state: SourceState | TargetState) -> None:
    """Run until an end of q's migration is in this state."""
    while state not in states(cluster):
        assert cluster.loop.turn()


@pytest.mark.fast
def test_a_source_takes_its_sequence_back_from_a_target_that_dies_during_the_commit() -> None:
    cluster = MovingCluster()
    moving(cluster)
    run_until(cluster, TargetState.PULLING_TAIL)
    cluster.kill("d1")
    cluster.run()
    cluster.check_at_rest()
    assert cluster.ends[0][1:] == (False, Cause.TARGET_SILENT)
    assert cluster.stood_still_s[0] > 0
    assert (cluster.requests["q"].instance_id, cluster.requests["q"].epoch) == ("d0", 5)


@pytest.mark.fast
def test_a_target_that_has_won_goes_on_when_its_source_dies_and_the_router_finds_it() -> None:
    cluster = MovingCluster()
    moving(cluster)
    run_until(cluster, TargetState.STARTED)
    now_s = cluster.loop.now_s
    cluster.kill("d0")
    assert cluster.ends[0][1:] == (True, None)
    assert cluster.requests["q"].epoch == 4  # not begun anew
    cluster.run(until_s=now_s + 0.01)
    assert cluster.migrations.incoming("d1") == 0
    cluster.run()
    cluster.check_at_rest()


@pytest.mark.fast
def test_a_preempted_sequence_stays() -> None:
    cluster = MovingCluster(dataclasses.replace(SLOW, total_blocks=40))
    cluster.place("old", 100, 400, "d0")
    cluster.place("q", 100, 300, "d0")
    cluster.loop.at(2.2, lambda: cluster.move("q", "d1"))
    cluster.run()
    cluster.check_at_rest()
    assert cluster.ends[0][1:] == (False, Cause.PREEMPTED)


@pytest.mark.fast
def test_a_sequence_that_ends_on_its_way_is_done() -> None:
    cluster = MovingCluster(SLOW)
    moving(cluster, 1000, 60)
    cluster.run()
    cluster.check_at_rest()
    assert cluster.ends[0][1:] == (False, Cause.FINISHED)


@pytest.mark.fast
def test_what_a_source_does_not_take() -> None:
    cluster = MovingCluster()
    for number in range(MAX_MIGRATIONS + 1):
        cluster.place(f"q{number}", 200, 200, "d0")
    cluster.run(until_s=0.3)

    def start(request_id: str, source: str, target: str, epoch: int = 3) -> bool:
        taken = cluster.migrations.start(Migration(request_id, source, target, epoch, MigrationReason.LOAD))
        cluster.begun += taken
        return taken

    assert not start("q0", "d1", "d2")  # not there
    assert not start("q0", "gone", "d2")
    assert not start("q0", "d0", "d0")
    assert not start("q0", "d0", "d1", epoch=2)
    assert start("q0", "d0", "d1")  # which takes some steps
    assert not start("q0", "d0", "d2")  # on its way
    assert all(start(f"q{number}", "d0", "d1") for number in range(1, MAX_MIGRATIONS))
    assert cluster.migrations.outgoing("d0") == MAX_MIGRATIONS
    assert not start(f"q{MAX_MIGRATIONS}", "d0", "d1")
    cluster.run()
    cluster.check_at_rest()
    assert cluster.migrations.migrated("d1") == MAX_MIGRATIONS


@pytest.mark.fast
def test_what_has_just_come_does_not_go_on_before_its_router_is_there() -> None:
    cluster = MovingCluster()
    moving(cluster)
    run_until(cluster, TargetState.STARTED)
    assert not cluster.migrations.start(Migration("q", "d1", "d2", 4, MigrationReason.LOAD))
    run_until_attached = cluster.loop.now_s + 0.01
    cluster.run(until_s=run_until_attached)
    assert cluster.move("q", "d2")
    cluster.run()
    cluster.check_at_rest()
    assert cluster.requests["q"].instance_id == "d2"


@pytest.mark.fast
@pytest.mark.parametrize("why", ["drains", "busy", "full"])
def test_what_a_target_refuses(why: str) -> None:
    cluster = MovingCluster(SLOW, instances=4)
    cluster.place("q", 1000, 400, "d0")
    if why == "full":
        cluster.place("large", 4000, 90, "d1")
        cluster.place("larger", 1500, 90, "d1")
    if why == "busy":
        for number in range(MAX_MIGRATIONS):
            cluster.place(f"q{number}", 200, 300, "d2")
            cluster.loop.at(0.6, lambda n=number: cluster.move(f"q{n}", "d1"))  # type: ignore[misc]
    if why == "drains":
        cluster.drain("d1")
    cluster.loop.at(0.7, lambda: cluster.move("q", "d1"))
    cluster.run()
    cluster.check_at_rest()
    assert [end[1:] for end in cluster.ends if end[0].request_id == "q"] == [(False, Cause.REFUSED)]


def test_many_runs_from_seeds_and_they_meet_what_they_are_meant_to() -> None:
    met: set[Cause | None] = set()
    for seed in range(SEEDS):
        met |= {cause for _, _, cause in run_seed(seed).ends}
    assert met == CAUSES


@pytest.mark.fast
@settings(max_examples=8, deadline=None)
@given(st.integers(1000, 1 << 32))
def test_any_seed(seed: int) -> None:
    run_seed(seed)


@pytest.mark.fast
@pytest.mark.parametrize("seed", [3, 8])
def test_a_run_is_its_seed(seed: int) -> None:
    assert run_seed(seed).log == run_seed(seed).log


@pytest.mark.fast
def test_a_failing_run_names_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.sim.moving.MAX_EVENTS", 5)
    with pytest.raises(AssertionError, match=r"replay it: python -m tests.sim.moving 7"):
        run_seed(7)


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(5))
def test_leaps_change_nothing(seed: int) -> None:
    logs = []
    for every_step in (True, False):
        cluster = random_cluster(seed, every_step=every_step)
        cluster.run()
        logs.append(cluster.log)
    assert logs[0] == logs[1]
