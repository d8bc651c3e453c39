"""What every ledger must do. Concrete classes provide ``ledger`` and ``lapse``, the passing of short lifetimes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import ClassVar

import pytest

from starmesh.ledger import Ledger, OwnershipConflict, Refusal, ReservationRefused
from starmesh.rounds import MAX_MOVES, MAX_ROUNDS, MAX_TEXT, MoveOutcome, RoundMove, RoundSummary
from starmesh.types import (
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    InstanceView,
    KvLayout,
    Leadership,
    Migration,
    MigrationReason,
    Ownership,
    Role,
    SequenceLoad,
    TransferBackend,
)

LONG_S = 600.0
# For what only has to lapse, and for what must live from one operation to the next before it lapses.
SHORT_S = 0.03
MEDIUM_S = 2.0

ROLE = Role.RESCHEDULER
LAYOUT = KvLayout(model_revision="r", dtype="float32", layers=2, kv_heads=1, head_dim=8, block_tokens=16)

# Awaits until the condition holds; virtual time moves on by MEDIUM_S.
Lapse = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


def instance(instance_id: str = "decode-0", incarnation: str = "one") -> InstanceInfo:
    return InstanceInfo(
        instance_id=instance_id,
        incarnation=incarnation,
        role=Role.DECODE,
        address="127.0.0.1:7000",
        layout=LAYOUT,
        transfer_backends=(TransferBackend.NIXL, TransferBackend.STREAM),
        max_sequence_tokens=2048,
        max_sequences=8,
    )


def load(*request_ids: str, free_blocks: int = 10) -> InstanceLoad:
    return InstanceLoad(
        total_blocks=100,
        free_blocks=free_blocks,
        running_sequences=len(request_ids),
        resident_tokens=7 * len(request_ids),
        step_duration_s=0.025,
        transfer_backend=TransferBackend.STREAM,
        sequences=tuple(SequenceLoad(name, 1, 5, 2, 7, 100) for name in request_ids),
    )


def round_summary(*request_ids: str, last_s: float = 7.5) -> RoundSummary:
    moves = tuple(
        RoundMove(
            Migration(name, "decode-0", "decode-1", 3, MigrationReason.PREDICTED_LOAD, 12.25),
            MoveOutcome.MOVED,
            duration_s=0.5,
            words="moved: 1.5 MB",
        )
        for name in request_ids
    )
    return RoundSummary(
        leader="rescheduler-0",
        term=1 << 41,
        policy="star",
        first_s=7.0,
        last_s=last_s,
        rounds=1 if moves else 4,
        instances=3,
        spread_before_tokens=10.5,
        spread_after_tokens=2.0,
        planned_moves=len(moves),
        moves=moves,
        skipped_instances={"stale": 1},
        skipped_sequences={"no_gain": 2, "settling": 5},
    )


async def only(ledger: Ledger) -> InstanceView:
    (found,) = (await ledger.view()).instances
    return found


class LedgerConformance:
    """The suite. It is collected in concrete classes only."""

    __test__: ClassVar[bool] = False

    async def test_view_shows_what_was_registered_and_reported(self, ledger: Ledger) -> None:
        assert (await ledger.view()).instances == ()
        await ledger.register(instance(), ttl_s=LONG_S)
        assert await only(ledger) == InstanceView(instance())
        before_s = (await ledger.view()).now_s
        assert await ledger.report("decode-0", "one", load("a", "b"), ttl_s=LONG_S)
        found = await only(ledger)
        assert (found.info, found.load) == (instance(), load("a", "b"))
        assert before_s <= found.reported_at_s <= (await ledger.view()).now_s

    async def test_view_is_ordered_by_id(self, ledger: Ledger) -> None:
        for name in ("b", "a-10", "a-2", "C"):
            await ledger.register(instance(name), ttl_s=LONG_S)
        names = [view.info.instance_id for view in (await ledger.view()).instances]
        assert names == sorted(names) and len(names) == 4

    async def test_bare_instance(self, ledger: Ledger) -> None:
        router = InstanceInfo("router-0", "one", Role.ROUTER, "127.0.0.1:1")
        await ledger.register(router, ttl_s=LONG_S)
        await ledger.report("router-0", "one", InstanceLoad(0, 0), ttl_s=LONG_S)
        assert (await only(ledger)).info == router
        with pytest.raises(ReservationRefused):
            await ledger.reserve("a", "router-0", 1, limit_tokens=100, ttl_s=LONG_S)

    async def test_registration_expires_with_its_load(self, ledger: Ledger, lapse: Lapse) -> None:
        await ledger.register(instance(), ttl_s=SHORT_S)
        await ledger.report("decode-0", "one", load(), ttl_s=SHORT_S)

        async def gone() -> bool:
            return not (await ledger.view()).instances

        await lapse(gone)
        assert not await ledger.report("decode-0", "one", load(), ttl_s=LONG_S)
        assert not await ledger.set_state("decode-0", "one", InstanceState.DRAINING)
        with pytest.raises(ReservationRefused) as refused:
            await ledger.reserve("a", "decode-0", 1, limit_tokens=10, ttl_s=LONG_S)
        assert (refused.value.instance_id, refused.value.reason) == ("decode-0", Refusal.NOT_REGISTERED)
        await ledger.register(instance(), ttl_s=LONG_S)
        assert (await only(ledger)).load is None

    async def test_report_renews_the_registration(self, ledger: Ledger, lapse: Lapse) -> None:
        await ledger.register(instance(), ttl_s=MEDIUM_S)
        await ledger.register(instance("other"), ttl_s=MEDIUM_S)
        assert await ledger.report("decode-0", "one", load(), ttl_s=LONG_S)

        async def other_gone() -> bool:
            return len((await ledger.view()).instances) == 1

        await lapse(other_gone)
        assert (await only(ledger)).load == load()

    async def test_new_incarnation_drops_load_and_reservations(self, ledger: Ledger) -> None:
        await ledger.register(instance(), ttl_s=LONG_S)
        await ledger.report("decode-0", "one", load(), ttl_s=LONG_S)
        await ledger.reserve("a", "decode-0", 16, limit_tokens=100, ttl_s=LONG_S)
        await ledger.register(instance(), ttl_s=LONG_S)
        assert (await only(ledger)).reserved_tokens == 16
        assert (await only(ledger)).load == load()
        await ledger.register(instance(incarnation="two"), ttl_s=LONG_S)
        assert await only(ledger) == InstanceView(instance(incarnation="two"))
        assert not await ledger.report("decode-0", "one", load(), ttl_s=LONG_S)
        assert not await ledger.set_state("decode-0", "one", InstanceState.DRAINED)
        await ledger.deregister("decode-0", "one")
        assert await only(ledger) == InstanceView(instance(incarnation="two"))

    async def test_deregister_removes_everything_and_is_idempotent(self, ledger: Ledger) -> None:
        await ledger.register(instance(), ttl_s=LONG_S)
        await ledger.reserve("a", "decode-0", 16, limit_tokens=100, ttl_s=LONG_S)
        await ledger.deregister("decode-0", "one")
        await ledger.deregister("decode-0", "one")
        assert (await ledger.view()).instances == ()
        await ledger.register(instance(), ttl_s=LONG_S)
        assert await only(ledger) == InstanceView(instance())

    async def test_state_changes_and_refuses_new_work(self, ledger: Ledger) -> None:
        await ledger.register(instance(), ttl_s=LONG_S)
        for state in (InstanceState.DRAINING, InstanceState.DRAINED):
            assert await ledger.set_state("decode-0", "one", state)
            assert await ledger.report("decode-0", "one", load(), ttl_s=LONG_S)
            assert (await only(ledger)).info == dataclasses.replace(instance(), state=state)
            with pytest.raises(ReservationRefused) as refused:
                await ledger.reserve("a", "decode-0", 1, limit_tokens=10, ttl_s=LONG_S)
            assert refused.value.reason is Refusal.NOT_READY
        assert await ledger.set_state("decode-0", "one", InstanceState.READY)
        await ledger.reserve("a", "decode-0", 1, limit_tokens=10, ttl_s=LONG_S)

    @pytest.mark.parametrize(
        ("free_blocks", "limit_tokens", "room"),
        [(10, 1000, 160), (10, 100, 100), (0, 100, 0), (None, 64, 64), (None, 0, 0)],
    )
    async def test_reservations_fill_the_room_exactly(
        self, ledger: Ledger, free_blocks: int | None, limit_tokens: int, room: int
    ) -> None:
        await ledger.register(instance(), ttl_s=LONG_S)
        if free_blocks is not None:
            await ledger.report("decode-0", "one", load(free_blocks=free_blocks), ttl_s=LONG_S)
        for tokens in (room // 2, room - room // 2):
            if tokens:
                await ledger.reserve(f"r{tokens}-{room}", "decode-0", tokens, limit_tokens=limit_tokens, ttl_s=LONG_S)
                room -= tokens
                await ledger.release(f"r{tokens}-{room + tokens}", "decode-0")
                await ledger.reserve(f"again-{room}", "decode-0", tokens, limit_tokens=limit_tokens, ttl_s=LONG_S)
        assert room == 0
        with pytest.raises(ReservationRefused) as refused:
            await ledger.reserve("last", "decode-0", 1, limit_tokens=limit_tokens, ttl_s=LONG_S)
        assert refused.value.reason is Refusal.NO_ROOM

    async def test_reserving_again_replaces(self, ledger: Ledger) -> None:
        await ledger.register(instance(), ttl_s=LONG_S)
        await ledger.reserve("a", "decode-0", 80, limit_tokens=100, ttl_s=LONG_S)
        await ledger.reserve("a", "decode-0", 90, limit_tokens=100, ttl_s=LONG_S)
        await ledger.reserve("b", "decode-0", 10, limit_tokens=100, ttl_s=LONG_S)
        with pytest.raises(ReservationRefused):
            await ledger.reserve("a", "decode-0", 91, limit_tokens=100, ttl_s=LONG_S)
        reserved = {item.request_id: item.tokens for item in (await only(ledger)).reservations}
        assert reserved == {"a": 90, "b": 10}

    async def test_report_drops_the_reservations_that_it_includes(self, ledger: Ledger) -> None:
        await ledger.register(instance(), ttl_s=LONG_S)
        for name in ("a", "b", "c"):
            await ledger.reserve(name, "decode-0", 16, limit_tokens=100, ttl_s=LONG_S)
        await ledger.report("decode-0", "one", load("a", "c", "other"), ttl_s=LONG_S)
        assert [item.request_id for item in (await only(ledger)).reservations] == ["b"]

    async def test_reservation_expires(self, ledger: Ledger, lapse: Lapse) -> None:
        await ledger.register(instance(), ttl_s=LONG_S)
        await ledger.reserve("keeps", "decode-0", 40, limit_tokens=100, ttl_s=LONG_S)
        await ledger.reserve("lapses", "decode-0", 60, limit_tokens=100, ttl_s=SHORT_S)

        async def gone() -> bool:
            return len((await only(ledger)).reservations) == 1

        await lapse(gone)
        await ledger.reserve("next", "decode-0", 60, limit_tokens=100, ttl_s=LONG_S)
        found = await ledger.view()
        assert [item.request_id for item in found.instances[0].reservations] == ["keeps", "next"]
        assert all(item.expires_at_s > found.now_s for item in found.instances[0].reservations)

    async def test_release_is_idempotent(self, ledger: Ledger) -> None:
        await ledger.release("a", "nobody")
        await ledger.register(instance(), ttl_s=LONG_S)
        await ledger.reserve("a", "decode-0", 100, limit_tokens=100, ttl_s=LONG_S)
        await ledger.release("a", "decode-0")
        await ledger.release("a", "decode-0")
        await ledger.reserve("b", "decode-0", 100, limit_tokens=100, ttl_s=LONG_S)

    async def test_concurrent_reserves_never_exceed_the_room(self, ledger: Ledger) -> None:
        await ledger.register(instance(), ttl_s=LONG_S)
        await ledger.report("decode-0", "one", load(free_blocks=10), ttl_s=LONG_S)
        outcomes = await asyncio.gather(
            *(ledger.reserve(f"r{i}", "decode-0", 7, limit_tokens=10_000, ttl_s=LONG_S) for i in range(100)),
            return_exceptions=True,
        )
        refused = [outcome for outcome in outcomes if outcome is not None]
        assert all(isinstance(outcome, ReservationRefused) for outcome in refused)
        assert len(outcomes) - len(refused) == 160 // 7
        assert (await only(ledger)).reserved_tokens == 160 // 7 * 7

    async def test_ownership_changes_by_compare_and_set(self, ledger: Ledger) -> None:
        assert await ledger.owner("r") is None
        await ledger.claim("r", "a", expected=None, epoch=1, ttl_s=LONG_S)
        assert await ledger.owner("r") == Ownership("a", 1)
        for expected in (None, Ownership("b", 1), Ownership("a", 2)):
            with pytest.raises(OwnershipConflict) as conflict:
                await ledger.claim("r", "b", expected=expected, epoch=3, ttl_s=LONG_S)
            assert conflict.value.current == Ownership("a", 1)
        await ledger.claim("r", "b", expected=Ownership("a", 1), epoch=2, ttl_s=LONG_S)
        assert await ledger.owner("r") == Ownership("b", 2)
        with pytest.raises(OwnershipConflict) as conflict:
            await ledger.claim("other", "b", expected=Ownership("a", 1), epoch=2, ttl_s=LONG_S)
        assert conflict.value.current is None

    async def test_concurrent_claims_have_one_winner(self, ledger: Ledger) -> None:
        for epoch in range(1, 4):
            expected = await ledger.owner("r")
            outcomes = await asyncio.gather(
                *(ledger.claim("r", f"d{i}", expected=expected, epoch=epoch, ttl_s=LONG_S) for i in range(50)),
                return_exceptions=True,
            )
            winners = [i for i, outcome in enumerate(outcomes) if outcome is None]
            assert len(winners) == 1
            owner = Ownership(f"d{winners[0]}", epoch)
            assert await ledger.owner("r") == owner
            assert all(isinstance(item, OwnershipConflict) and item.current == owner for item in outcomes if item)

    async def test_ownership_expires_unless_renewed(self, ledger: Ledger, lapse: Lapse) -> None:
        for name in ("renewed", "lapses", "stale"):
            await ledger.claim(name, "a", expected=None, epoch=2, ttl_s=MEDIUM_S)
        owned = {"absent": 1, "renewed": 2, "stale": 1, "missing": 1}
        assert await ledger.renew(owned, ttl_s=LONG_S) == ["absent", "missing"]

        async def gone() -> bool:
            return await ledger.owner("lapses") is None and await ledger.owner("stale") is None

        await lapse(gone)
        assert await ledger.owner("renewed") == Ownership("a", 2)
        assert await ledger.owner("missing") is None
        await ledger.claim("lapses", "b", expected=None, epoch=1, ttl_s=LONG_S)

    async def test_renews_more_than_a_batch(self, ledger: Ledger, lapse: Lapse) -> None:
        assert await ledger.renew({}, ttl_s=LONG_S) == []
        owned = {f"r{i}": 1 + i % 3 for i in range(1100)}
        for name in ("r0", "r511", "r512", "r1099"):
            await ledger.claim(name, "a", expected=None, epoch=owned[name], ttl_s=MEDIUM_S)
        await ledger.claim("not-renewed", "a", expected=None, epoch=1, ttl_s=MEDIUM_S)
        missing = await ledger.renew(owned, ttl_s=LONG_S)
        assert missing == [name for name in owned if name not in ("r0", "r511", "r512", "r1099")]

        async def gone() -> bool:
            return await ledger.owner("not-renewed") is None

        await lapse(gone)
        assert [await ledger.owner(name) for name in ("r0", "r511", "r512", "r1099", "r1")] == [
            Ownership("a", 1),
            Ownership("a", 2),
            Ownership("a", 3),
            Ownership("a", 2),
            None,
        ]

    async def test_disown_spares_a_newer_owner(self, ledger: Ledger) -> None:
        await ledger.disown("r", 1)
        await ledger.claim("r", "a", expected=None, epoch=5, ttl_s=LONG_S)
        await ledger.disown("r", 4)
        assert await ledger.owner("r") == Ownership("a", 5)
        await ledger.disown("r", 10)
        assert await ledger.owner("r") is None

    async def test_one_leads_until_it_resigns(self, ledger: Ledger) -> None:
        assert await ledger.leader(ROLE) is None
        term = await ledger.lead(ROLE, "a", "one", ttl_s=LONG_S)
        assert term is not None and term > 0
        assert await ledger.lead(ROLE, "b", "one", ttl_s=LONG_S) is None
        assert await ledger.lead(ROLE, "a", "two", ttl_s=LONG_S) is None
        assert await ledger.lead(ROLE, "a", "one", ttl_s=LONG_S) == term
        assert await ledger.leader(ROLE) == Leadership("a", term)
        assert await ledger.leader(Role.PREDICTOR) is None
        for other in (("b", "one"), ("a", "two")):
            await ledger.resign(ROLE, *other)
        assert await ledger.leader(ROLE) == Leadership("a", term)
        await ledger.resign(ROLE, "a", "one")
        assert await ledger.leader(ROLE) is None
        await ledger.resign(ROLE, "a", "one")
        newer = await ledger.lead(ROLE, "b", "one", ttl_s=LONG_S)
        assert newer is not None and newer > term
        await ledger.resign(ROLE, "a", "one")
        assert await ledger.leader(ROLE) == Leadership("b", newer)

    async def test_terms_rise_with_each_lead(self, ledger: Ledger) -> None:
        terms = []
        for turn in range(20):
            terms.append(await ledger.lead(ROLE, f"r{turn % 2}", "one", ttl_s=LONG_S))
            await ledger.resign(ROLE, f"r{turn % 2}", "one")
        assert None not in terms and terms == sorted(set(terms))  # type: ignore[type-var]

    async def test_a_lead_ends_unless_renewed(self, ledger: Ledger, lapse: Lapse) -> None:
        first = await ledger.lead(ROLE, "a", "one", ttl_s=SHORT_S)
        assert first is not None

        async def over() -> bool:
            return await ledger.leader(ROLE) is None

        await lapse(over)
        # Nobody knows what the leader did not do meanwhile: it too begins anew.
        second = await ledger.lead(ROLE, "a", "one", ttl_s=SHORT_S)
        assert second is not None and second > first
        await lapse(over)
        third = await ledger.lead(ROLE, "b", "one", ttl_s=MEDIUM_S)
        assert third is not None and third > second
        assert await ledger.lead(ROLE, "b", "one", ttl_s=LONG_S) == third
        await ledger.register(instance(), ttl_s=MEDIUM_S)

        async def gone() -> bool:
            return not (await ledger.view()).instances

        await lapse(gone)
        assert await ledger.leader(ROLE) == Leadership("b", third)

    async def test_concurrent_candidates_have_one_leader(self, ledger: Ledger) -> None:
        terms = await asyncio.gather(*(ledger.lead(ROLE, f"r{i}", "one", ttl_s=LONG_S) for i in range(50)))
        (winner,) = [i for i, term in enumerate(terms) if term is not None]
        assert await ledger.leader(ROLE) == Leadership(f"r{winner}", terms[winner] or 0)

    async def test_rounds_are_shown_until_others_are(self, ledger: Ledger, lapse: Lapse) -> None:
        assert await ledger.rounds() == ()
        first = [round_summary("a", "b", last_s=8.0), round_summary()]
        await ledger.publish_rounds(first, ttl_s=LONG_S)
        assert await ledger.rounds() == tuple(first)
        await ledger.publish_rounds([round_summary()], ttl_s=SHORT_S)

        async def forgotten() -> bool:
            return await ledger.rounds() == ()

        await lapse(forgotten)
        await ledger.publish_rounds([], ttl_s=LONG_S)
        assert await ledger.rounds() == ()

    async def test_rounds_have_bounds(self, ledger: Ledger) -> None:
        longest = round_summary(*(f"r{number}" for number in range(MAX_MOVES)))
        await ledger.publish_rounds([longest] * MAX_ROUNDS, ttl_s=LONG_S)
        assert await ledger.rounds() == (longest,) * MAX_ROUNDS
        plain = round_summary("a")
        replace = dataclasses.replace
        for bad in (
            [plain] * (MAX_ROUNDS + 1),
            [replace(plain, moves=plain.moves * (MAX_MOVES + 1))],
            [replace(plain, skipped_sequences={str(number): 1 for number in range(99)})],
            [replace(plain, policy="x" * (MAX_TEXT + 1))],
            [replace(plain, skipped_instances={"x" * (MAX_TEXT + 1): 1})],
            [replace(plain, skipped_instances={"x": -1})],
            [replace(plain, moves=(replace(plain.moves[0], words="x" * (MAX_TEXT + 1)),))],
            [replace(plain, leader="a b")],
            [replace(plain, rounds=-1)],
            [replace(plain, last_s=float("nan"))],
            [replace(plain, spread_after_tokens=float("inf"))],
        ):
            with pytest.raises(ValueError):
                await ledger.publish_rounds(bad, ttl_s=LONG_S)
        with pytest.raises(ValueError):
            await ledger.publish_rounds([plain], ttl_s=0)
        assert await ledger.rounds() == (longest,) * MAX_ROUNDS

    @pytest.mark.parametrize("bad", ["", "a b", "a" * 129, "ä", "{x}", "a\n"])
    async def test_refuses_malformed_ids(self, ledger: Ledger, bad: str) -> None:
        for call in (
            ledger.register(instance(bad), ttl_s=1),
            ledger.register(instance(incarnation=bad), ttl_s=1),
            ledger.report(bad, "one", load(), ttl_s=1),
            ledger.set_state("decode-0", bad, InstanceState.READY),
            ledger.deregister(bad, "one"),
            ledger.reserve(bad, "decode-0", 1, limit_tokens=1, ttl_s=1),
            ledger.release("r", bad),
            ledger.claim("r", bad, expected=None, epoch=1, ttl_s=1),
            ledger.owner(bad),
            ledger.renew({bad: 1}, ttl_s=1),
            ledger.disown(bad, 1),
            ledger.lead(ROLE, bad, "one", ttl_s=1),
            ledger.resign(ROLE, "a", bad),
        ):
            with pytest.raises(ValueError, match="an id is"):
                await call

    async def test_refuses_numbers_out_of_range(self, ledger: Ledger) -> None:
        await ledger.register(instance(), ttl_s=LONG_S)
        for call in (
            *(ledger.register(instance(), ttl_s=ttl_s) for ttl_s in (0, -1, float("nan"), float("inf"))),
            ledger.report("decode-0", "one", InstanceLoad(1, 2), ttl_s=1),
            ledger.reserve("r", "decode-0", 0, limit_tokens=1, ttl_s=1),
            ledger.reserve("r", "decode-0", 1, limit_tokens=-1, ttl_s=1),
            ledger.claim("r", "a", expected=None, epoch=0, ttl_s=1),
            ledger.claim("r", "a", expected=Ownership("b", 2), epoch=2, ttl_s=1),
            ledger.claim("r", "a", expected=None, epoch=2**53, ttl_s=1),
            ledger.renew({"r": 0}, ttl_s=1),
            ledger.disown("r", 0),
            ledger.lead(ROLE, "a", "one", ttl_s=0),
        ):
            with pytest.raises(ValueError):
                await call
