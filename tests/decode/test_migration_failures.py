"""What goes wrong while a sequence moves: it stays, is taken back or ends, exactly, and nothing is left anywhere."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import grpc
import pytest

from services.decode.source_migration import SourceMigration
from services.decode.target_calls import Verdict
from starmesh.engine.engine import EngineCore
from starmesh.engine.sequence import SequenceStatus
from starmesh.migration.source_record import SourceState
from starmesh.migration.target_record import TargetState
from starmesh.migration.terms import Cause
from starmesh.types import FinishReason, Ownership
from tests.decode.cluster import LIMITS, Cluster, Hold, running_cluster
from tests.instance.running import PATIENCE_S, spec, until

# The tests of what does not answer wait for these; the others end before, on a busy machine too.
IMPATIENT = dataclasses.replace(
    LIMITS,
    reserve_s=3.0,
    round_s=3.0,
    commit_s=1.5,
    take_back_s=1.0,
    idle_s=4.0,
    claim_s=0.8,
    attach_s=2.0,
    pause_s=0.01,
)


class Stages:
    """Holds a migration from A to B up: before the target reserves, pulls the first round or the tail, or claims."""

    NAMES = ("reserve", "copy", "freeze", "tail", "claim")

    def __init__(self, cluster: Cluster, stage: str) -> None:
        self._cluster = cluster
        self._stage = stage
        target = cluster.worker("B")
        instance, ledger = cluster.decode["B"].instance, cluster.ledgers["B"]
        self.hold: Hold | None = None
        match stage:
            case "reserve":
                self.hold = Hold(target.migrator.incoming, "reserve")
            case "copy":
                self.hold = Hold(instance, "pull")
            case "tail":
                self.hold = Hold(instance, "pull", lambda: TargetState.PULLING_TAIL in cluster.target_states("B"))
            case "claim":
                self.hold = Hold(ledger, "claim")

    async def begin(self) -> SourceMigration:
        """Begin a migration and wait until it is where it is held up."""
        migration = self._cluster.migrate("a", "A", "B")
        if self._stage == "freeze":
            self.hold = Hold(migration._sequence, "freeze")
        assert self.hold is not None
        await self.hold.until_reached()
        return migration

    def go_on(self) -> None:
        """Hold nothing up any more."""
        assert self.hold is not None
        self.hold.open.set()


async def _goes_on(cluster: Cluster, owner: Ownership, *, refused: bool = False) -> None:
    """The request's tokens are all there in the end, under ``owner``, and nothing is left."""
    request = cluster.router.requests["a"]
    assert await request.ended() is FinishReason.LENGTH
    assert request.stream.token_ids == request.reference
    assert request.owner == owner
    assert refused or not request.refused
    await cluster.nothing_left()


# What happens to the sequence meanwhile.


@pytest.mark.parametrize("stage", Stages.NAMES)
@pytest.mark.parametrize("how", ["cancel", "disconnect", "deadline"])
async def test_a_sequence_that_is_not_wanted_any_more_ends_at_both_ends(stage: str, how: str) -> None:
    async with running_cluster() as cluster:
        request = await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, stage)
        migration = await stages.begin()
        if how == "cancel":
            await cluster.router.cancel("A", "a", 1)
        elif how == "disconnect":
            await cluster.router.part("A")
        else:
            worker = cluster.worker("A")
            worker._expire(worker._running["a"])
            assert await request.ended() is FinishReason.CANCELLED
        outcome = await asyncio.wait_for(migration.outcome(), PATIENCE_S)
        assert (outcome.state, outcome.cause) == (SourceState.ENDED, Cause.CANCELLED)
        stages.go_on()
        await cluster.nothing_left()
        request.check()


@pytest.mark.parametrize("stage", ["reserve", "copy", "freeze"])
async def test_a_sequence_that_finishes_meanwhile_ends_at_both_ends(stage: str) -> None:
    async with running_cluster() as cluster:
        request = await cluster.router.start(spec(limit=150), "A")
        stages = Stages(cluster, stage)
        migration = await stages.begin()
        cluster.hurry()
        outcome = await asyncio.wait_for(migration.outcome(), PATIENCE_S)
        assert (outcome.state, outcome.cause) == (SourceState.ENDED, Cause.FINISHED)
        stages.go_on()
        assert await request.ended() is FinishReason.LENGTH
        assert request.stream.token_ids == request.reference
        await cluster.nothing_left()


@pytest.mark.parametrize("stage", ["reserve", "copy", "freeze"])
@pytest.mark.parametrize("again", [False, True])
async def test_what_was_copied_is_void_once_it_was_preempted(stage: str, again: bool) -> None:
    """Also when it runs again by the time that the source looks."""
    async with running_cluster() as cluster:
        await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, stage)
        migration = await stages.begin()
        engine = cluster.decode["A"].instance.engine

        def preempt(core: EngineCore) -> None:
            core._scheduler._preempt(core._scheduler.find("a", SequenceStatus.RUNNING))

        async def runs() -> bool:
            return await engine.call(lambda core: core._scheduler.sequences["a"].status is SequenceStatus.RUNNING)

        await engine.call(preempt)
        if again:
            await until(runs)
        stages.go_on()
        outcome = await asyncio.wait_for(migration.outcome(), PATIENCE_S)
        assert (outcome.state, outcome.cause) == (SourceState.STAYED, Cause.PREEMPTED)
        await _goes_on(cluster, Ownership("A", 1))


async def test_a_sequence_that_waits_for_blocks_stays() -> None:
    async with running_cluster() as cluster:
        await cluster.router.start(spec(limit=400), "A")
        engine = cluster.decode["A"].instance.engine
        hold = Hold(cluster.worker("B").migrator.incoming, "reserve")
        blocks = await engine.call(lambda core: core.reserve("other", 1, 4 * (core._pool.free_blocks - 6)))
        assert blocks is not None

        def preempt(core: EngineCore) -> None:
            core._scheduler._preempt(core._scheduler.find("a", SequenceStatus.RUNNING))
            core._scheduler.incoming["more"] = dataclasses.replace(
                core._scheduler.incoming["other"],
                request_id="more",
                block_ids=tuple(core._pool.allocate(core._pool.free_blocks)),
            )

        await engine.call(preempt)
        outcome = await cluster.migrate("a", "A", "B").outcome()
        assert (outcome.state, outcome.cause) == (SourceState.STAYED, Cause.PREEMPTED)
        hold.open.set()
        for name in ("other", "more"):
            await engine.call(lambda core, name=name: core.cancel(name))
        await _goes_on(cluster, Ownership("A", 1))


async def test_a_sequence_that_outgrows_what_was_set_aside_stays() -> None:
    limits = dataclasses.replace(LIMITS, headroom_blocks=1)
    async with running_cluster(limits=limits) as cluster:
        request = await cluster.router.start(spec(limit=400), "A")
        hold = Hold(cluster.decode["B"].instance, "pull")
        migration = cluster.migrate("a", "A", "B")
        await hold.until_reached()
        have = len(request.stream.token_ids)
        await request.until(lambda: len(request.stream.token_ids) > have + 16)
        hold.open.set()
        outcome = await migration.outcome()
        assert (outcome.state, outcome.cause) == (SourceState.STAYED, Cause.OUTGROWN)
        await _goes_on(cluster, Ownership("A", 1))


# What happens to the target.


@pytest.mark.parametrize("stage", ["reserve", "copy", "tail", "claim"])
async def test_a_target_that_dies_leaves_the_sequence_at_its_source(stage: str) -> None:
    """From the commit on under a newer epoch: nobody can say whether the target has claimed it."""
    async with running_cluster(limits=IMPATIENT) as cluster:
        await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, stage)
        migration = await stages.begin()
        await cluster.decode["B"].instance.server.stop(0)
        outcome = await asyncio.wait_for(migration.outcome(), PATIENCE_S)
        assert (outcome.state, outcome.cause) == (SourceState.STAYED, Cause.TARGET_SILENT)
        owner = Ownership("A", 3 if stage in ("tail", "claim") else 1)
        assert await cluster.ledger.owner("a") == owner
        stages.go_on()
        await _goes_on(cluster, owner)


@pytest.mark.parametrize("stage", ["reserve", "copy", "tail", "claim"])
async def test_a_target_that_does_not_answer_is_waited_for_so_long(stage: str) -> None:
    limits = dataclasses.replace(IMPATIENT, reserve_s=1.0, round_s=1.0, idle_s=2.0)
    async with running_cluster(limits=limits) as cluster:
        await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, stage)
        migration = await stages.begin()
        outcome = await asyncio.wait_for(migration.outcome(), PATIENCE_S)
        assert outcome.state is SourceState.STAYED
        # The target gives up before its source does, and says so where it knows.
        causes = {"reserve": (Cause.TIMED_OUT, Cause.TARGET_SILENT), "tail": (Cause.DECLINED,)}
        expected = causes.get(stage, (Cause.TARGET_SILENT, Cause.TIMED_OUT, Cause.DECLINED))
        assert outcome.cause in expected
        stages.go_on()
        await cluster.router.cancel("A", "a", 9)
        await cluster.nothing_left()
        cluster.router.requests["a"].check()


async def test_calls_that_come_twice_are_answered_twice() -> None:
    """At the same time, and again when the first has been answered."""
    async with running_cluster() as cluster:
        await cluster.router.start(spec(limit=400), "A")
        migration = cluster.migrate("a", "A", "B")
        target = migration._shell.target
        answers: dict[str, list[Any]] = {}

        def double(name: str) -> None:
            call = getattr(target, name)

            async def doubled(*args: Any, **kwargs: Any) -> Any:
                both = await asyncio.gather(call(*args, **kwargs), call(*args, **kwargs))
                answers.setdefault(name, []).extend([*both, await call(*args, **kwargs)])
                return both[0]

            setattr(target, name, doubled)

        for name in ("reserve", "copy", "commit"):
            double(name)
        assert (await migration.outcome()).moved
        assert len(set(answers["reserve"])) == 1
        assert {verdict for verdict, _ in answers["copy"]} == {Verdict.DONE}
        assert [verdict for verdict, _ in answers["commit"]] == [Verdict.DONE] * 3
        await _goes_on(cluster, Ownership("B", 2))


async def test_a_pull_that_fails_is_declined() -> None:
    async with running_cluster() as cluster:
        await cluster.router.start(spec(limit=400), "A")
        hold = Hold(cluster.decode["B"].instance, "pull")
        migration = cluster.migrate("a", "A", "B")
        await hold.until_reached()
        cluster.decode["A"].instance.revoke_migration_leases(migration.terms.reservation_id)
        hold.open.set()
        outcome = await migration.outcome()
        assert (outcome.state, outcome.cause) == (SourceState.STAYED, Cause.DECLINED)
        await _goes_on(cluster, Ownership("A", 1))


async def test_a_target_that_stops_in_between_leaves_the_sequence_at_its_source() -> None:
    async with running_cluster(grace_s=0.01) as cluster:
        await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, "copy")
        migration = await stages.begin()
        stopping = asyncio.create_task(cluster.decode["B"].stop())
        outcome = await asyncio.wait_for(migration.outcome(), PATIENCE_S)
        assert outcome.state is SourceState.STAYED
        await stopping
        del cluster.decode["B"]
        await _goes_on(cluster, Ownership("A", 1))


@pytest.mark.parametrize("stage", Stages.NAMES)
async def test_a_source_that_stops_in_between_leaves_nothing_at_the_target(stage: str) -> None:
    async with running_cluster(limits=IMPATIENT, grace_s=0.01) as cluster:
        request = await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, stage)
        migration = await stages.begin()
        stopping = asyncio.create_task(cluster.decode["A"].stop())
        outcome = await asyncio.wait_for(migration.outcome(), PATIENCE_S)
        assert (outcome.state, outcome.cause) == (SourceState.ENDED, Cause.CANCELLED)
        stages.go_on()
        await request.until(lambda: request.failure is not None)
        assert request.failure is not None and request.failure.code is grpc.StatusCode.ABORTED
        await stopping
        del cluster.decode["A"]
        await cluster.nothing_left()


# What happens to the ledger.


@pytest.mark.parametrize("answers", [["done"], ["lost"], ["lost", "done"], ["lost", "lost", "lost"]])
async def test_a_claim_whose_answer_is_lost_is_asked_for(answers: list[str]) -> None:
    async with running_cluster() as cluster:
        await cluster.router.start(spec(limit=400), "A")
        cluster.ledgers["B"].claim_answers = answers
        assert (await cluster.migrate("a", "A", "B").outcome()).moved
        await _goes_on(cluster, Ownership("B", 2))


async def test_a_target_whose_ledger_is_silent_gives_up_and_the_source_takes_back() -> None:
    async with running_cluster(limits=IMPATIENT) as cluster:
        await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, "claim")
        migration = await stages.begin()
        cluster.ledgers["B"].silent = True
        stages.go_on()
        outcome = await migration.outcome()
        assert (outcome.state, outcome.cause) == (SourceState.STAYED, Cause.TARGET_SILENT)
        assert await cluster.ledger.owner("a") == Ownership("A", 3)
        await _goes_on(cluster, Ownership("A", 3))


@pytest.mark.parametrize("answers", [["done"], ["lost"], ["lost", "done"]])
async def test_a_source_that_takes_back_asks_for_the_answer_that_was_lost(answers: list[str]) -> None:
    async with running_cluster(limits=IMPATIENT) as cluster:
        await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, "claim")
        migration = await stages.begin()
        cluster.ledgers["A"].claim_answers = answers
        await cluster.decode["B"].instance.server.stop(0)
        assert (await migration.outcome()).state is SourceState.STAYED
        assert await cluster.ledger.owner("a") == Ownership("A", 3)
        stages.go_on()
        await _goes_on(cluster, Ownership("A", 3))


async def test_a_ledger_that_restarted_empty_moves_nothing() -> None:
    async with running_cluster() as cluster:
        await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, "claim")
        migration = await stages.begin()
        await cluster.ledger.disown("a", 9)
        stages.go_on()
        outcome = await migration.outcome()
        assert (outcome.state, outcome.cause) == (SourceState.STAYED, Cause.DECLINED)
        await _goes_on(cluster, Ownership("A", 1))


async def test_a_sequence_that_was_taken_back_is_cancelled_by_the_epoch_that_its_router_knows() -> None:
    async with running_cluster(limits=IMPATIENT) as cluster:
        request = await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, "claim")
        migration = await stages.begin()
        await cluster.decode["B"].instance.server.stop(0)
        assert (await migration.outcome()).state is SourceState.STAYED
        stages.go_on()
        assert cluster.worker("A").running["a"].epoch == 3
        await cluster.router.cancel("A", "a", 1)
        await cluster.nothing_left()
        request.check()


async def test_a_claim_that_was_done_without_the_target_knowing_is_found_by_the_source() -> None:
    """The target has given up by then: it says so to the router, which prefills again."""
    async with running_cluster(limits=IMPATIENT) as cluster:
        request = await cluster.router.start(spec(limit=400), "A")
        ledger = cluster.ledgers["B"]

        async def claim(*args: Any, **kwargs: Any) -> None:
            await cluster.ledger.claim(*args, **kwargs)
            ledger.silent = True
            await type(ledger).claim(ledger, *args, **kwargs)

        ledger.claim = claim  # type: ignore[method-assign]
        assert (await cluster.migrate("a", "A", "B").outcome()).moved
        await request.until(lambda: request.failure is not None)
        assert request.failure is not None and request.failure.code is grpc.StatusCode.NOT_FOUND
        assert request.owner == Ownership("B", 2)
        await cluster.nothing_left()


async def test_without_a_ledger_the_source_gives_the_sequence_up_in_doubt() -> None:
    async with running_cluster(limits=IMPATIENT) as cluster:
        request = await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, "claim")
        migration = await stages.begin()
        for ledger in cluster.ledgers.values():
            ledger.silent = True
        stages.go_on()
        outcome = await asyncio.wait_for(migration.outcome(), PATIENCE_S)
        assert (outcome.state, outcome.cause) == (SourceState.IN_DOUBT, Cause.TIMED_OUT)
        await request.until(lambda: request.failure is not None)
        assert request.failure is not None and request.failure.code is grpc.StatusCode.NOT_FOUND
        await cluster.nothing_left()


async def test_a_sequence_that_another_has_taken_over_is_declined() -> None:
    """A router that went on elsewhere has claimed first."""
    async with running_cluster() as cluster:
        await cluster.router.start(spec(limit=400), "A")
        stages = Stages(cluster, "claim")
        migration = await stages.begin()
        await cluster.ledger.claim("a", "elsewhere", expected=Ownership("A", 1), epoch=4, ttl_s=30)
        stages.go_on()
        outcome = await migration.outcome()
        assert (outcome.state, outcome.cause) == (SourceState.STAYED, Cause.DECLINED)
        assert await cluster.ledger.owner("a") == Ownership("elsewhere", 4)
        await _goes_on(cluster, Ownership("A", 1))


@pytest.mark.parametrize("done_first", [True, False])
async def test_a_claim_done_for_a_migration_that_is_over_leaves_no_entry(done_first: bool) -> None:
    async with running_cluster() as cluster:
        await cluster.router.start(spec(limit=150), "A")
        held = Hold(cluster.ledgers["B"], "claim", after=done_first)
        cluster.migrate("a", "A", "B")
        await held.until_reached()
        await cluster.router.cancel("A", "a", 1)
        await cluster.ledger.disown("a", 1)

        async def given_up() -> bool:
            return not cluster.target_states("B") and not cluster.worker("A").migrator.counts().outgoing

        await until(given_up)
        if not done_first:
            # The next request of this id has begun at the same instance: the claim takes it for the one that it knew.
            await cluster.ledger.claim("a", "A", expected=None, epoch=1, ttl_s=30)
        held.open.set()

        async def no_entry() -> bool:
            return await cluster.ledger.owner("a") is None

        await until(no_entry)
        await cluster.nothing_left()
