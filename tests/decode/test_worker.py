"""Handoff and decode between two real instances: exact tokens, and nothing left whatever is cut short when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import pytest

from services.decode.link import RouterLink
from services.decode.worker import DecodeWorker
from services.prefill.worker import PrefillWorker
from starmesh.clock import WallClock
from starmesh.ledger.memory import MemoryLedger
from starmesh.rpc.status import from_sequence_status
from starmesh.transfer import PullResult
from starmesh.types import KvTicket, Role, SequenceSpec
from starmesh.v1 import sequence_pb2
from tests.engine.checking_executor import reference_tokens
from tests.instance.running import PATIENCE_S, Running, running_instance, spec


@dataclass
class Pair:
    """A prefill and a decode instance, and what a router has of the latter."""

    prefill: Running
    decode: Running
    link: RouterLink = field(default_factory=RouterLink)

    async def prefilled(self, sequence: SequenceSpec) -> tuple[SequenceSpec, KvTicket]:
        """Prefill it; returns it with its first token, and the ticket."""
        done = await self.prefill.worker.prefill(sequence, "checking")
        assert done.ticket is not None
        return _continued(sequence, done.token_id), done.ticket

    def start(self, sequence: SequenceSpec, ticket: KvTicket, *, link: RouterLink | None = None) -> None:
        self.decode.worker.start(link or self.link, sequence, ticket, timeout_s=60.0, traceparent="")

    async def outputs(
        self, request_id: str, *, epoch: int = 1, link: RouterLink | None = None
    ) -> list[sequence_pb2.SequenceOutput]:
        """All outputs of a sequence, to its end."""
        found: list[sequence_pb2.SequenceOutput] = []
        async with asyncio.timeout(PATIENCE_S):
            while not found or not (found[-1].finish_reason or found[-1].HasField("failure")):
                message = await (link or self.link).take()
                found += [one for one in message.outputs if (one.request_id, one.epoch) == (request_id, epoch)]
        return found

    async def give_back(self, request_id: str) -> None:
        """End a lease that nobody needs, as a router does, or its expiry; one that was pulled is over."""
        self.prefill.instance.revoke_lease(request_id, 99)
        await self.prefill.instance.engine.call(lambda core: core.cancel(request_id))

    async def nothing_left(self) -> None:
        await self.decode.nothing_left()
        await self.prefill.nothing_left()
        assert not self.decode.worker._running
        assert not self.decode.worker._freeing


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    ledger = MemoryLedger(WallClock())
    async with (
        running_instance(Role.PREFILL, ledger, PrefillWorker) as prefill,
        running_instance(Role.DECODE, ledger, DecodeWorker) as decode,
    ):
        yield Pair(prefill, decode)


class Gate:
    """Holds the pulls of an instance up, as a cancelled pull is held up by bytes that are still on their way."""

    def __init__(self, running: Running) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self._pull = running.instance.pull
        running.instance.pull = self  # type: ignore[method-assign, assignment]
        self.deaf = False
        """Whether a cancel has to wait for the gate."""

    async def __call__(self, ticket: KvTicket, local_block_ids: tuple[int, ...]) -> PullResult:
        self.reached.set()
        while not self.open.is_set():
            try:
                await self.open.wait()
            except asyncio.CancelledError:
                if not self.deaf:
                    raise
                await self.open.wait()
                raise
        return await self._pull(ticket, local_block_ids)


async def test_decode_goes_on_where_prefill_ended(pair: Pair) -> None:
    sequence, ticket = await pair.prefilled(spec())
    pair.start(sequence, ticket)
    outputs = await pair.outputs("a")
    assert [output.offset for output in outputs] == list(range(1, 20))
    tokens = [*sequence.output_token_ids, *(token for output in outputs for token in output.token_ids)]
    assert tokens == reference_tokens(sequence.prompt_token_ids, 20)
    assert outputs[-1].finish_reason == sequence_pb2.FINISH_REASON_LENGTH
    await pair.nothing_left()


@pytest.mark.parametrize("turns", [*range(12), 16, 24, 40, 80])
@pytest.mark.parametrize("by", ["cancel", "disconnect", "deadline"])
async def test_cut_short_at_any_await(pair: Pair, turns: int, by: str) -> None:
    sequence, ticket = await pair.prefilled(spec(limit=200))
    pair.start(sequence, ticket)
    for _ in range(turns):
        await asyncio.sleep(0)
    worker = pair.decode.worker
    cut: dict[str, Callable[[], None]] = {
        "cancel": lambda: worker.cancel(pair.link, "a", 1),
        "disconnect": lambda: worker.disconnect(pair.link),
        "deadline": lambda: worker._expire(worker._running["a"]),
    }
    if "a" in worker._running:  # on a busy machine many steps pass in a turn
        cut[by]()
    await pair.decode.nothing_left()
    await pair.give_back("a")
    await pair.nothing_left()


async def test_a_cancel_is_for_its_router_and_its_epoch_only(pair: Pair) -> None:
    sequence, ticket = await pair.prefilled(spec(epoch=2))
    pair.start(sequence, ticket)
    pair.decode.worker.cancel(pair.link, "a", 1)
    pair.decode.worker.cancel(RouterLink(), "a", 2)
    pair.decode.worker.cancel(pair.link, "b", 2)
    assert len(await pair.outputs("a", epoch=2)) == 19
    await pair.nothing_left()


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 8, 16, 40])
async def test_a_newer_epoch_takes_over_and_the_older_ones_router_hears_of_it(pair: Pair, turns: int) -> None:
    older, older_ticket = await pair.prefilled(spec(limit=200))
    other = RouterLink()
    pair.start(older, older_ticket, link=other)
    for _ in range(turns):
        await asyncio.sleep(0)
    with pair.decode.no_steps():  # or the older one may end before the newer one comes
        newer, ticket = await pair.prefilled(spec(epoch=2, limit=200))
        pair.start(newer, ticket)
    failure = (await pair.outputs("a", link=other))[-1]
    assert from_sequence_status(failure.failure).code is grpc.StatusCode.ABORTED
    outputs = await pair.outputs("a", epoch=2)
    tokens = [*newer.output_token_ids, *(token for output in outputs for token in output.token_ids)]
    assert tokens == reference_tokens(newer.prompt_token_ids, 200)
    await pair.nothing_left()


async def test_a_newer_epoch_that_is_cancelled_at_once_takes_the_older_one_with_it(pair: Pair) -> None:
    older, ticket = await pair.prefilled(spec(limit=200))
    pair.start(older, ticket)
    assert (await pair.link.take()).outputs
    newer, ticket = await pair.prefilled(spec(epoch=2))
    pair.start(newer, ticket)
    pair.decode.worker.cancel(pair.link, "a", 2)
    while pair.decode.worker._freeing:
        await asyncio.sleep(0)
    assert not (await pair.decode.instance.load()).sequences, "the older one goes on for nobody"
    await pair.give_back("a")
    await pair.nothing_left()


async def test_blocks_are_not_freed_while_a_cancelled_pull_still_writes(pair: Pair) -> None:
    """Nor for the epoch after, nor when that one is cancelled too: the bytes would land in another's blocks."""
    gate = Gate(pair.decode)
    gate.deaf = True
    sequence, ticket = await pair.prefilled(spec(epoch=1))
    pair.start(sequence, ticket)
    await asyncio.wait_for(gate.reached.wait(), PATIENCE_S)

    async def reserved_epoch() -> int:
        for _ in range(3):  # whatever is on its way to the engine gets there first
            await pair.decode.instance.load()
        return await pair.decode.instance.engine.call(lambda core: core._scheduler.incoming["a"].epoch)

    pair.decode.worker.cancel(pair.link, "a", 1)
    assert await reserved_epoch() == 1
    newer, newer_ticket = await pair.prefilled(spec(epoch=2))
    pair.start(newer, newer_ticket)
    assert await reserved_epoch() == 1
    pair.decode.worker.cancel(pair.link, "a", 2)
    assert await reserved_epoch() == 1
    pair.start(newer, newer_ticket)
    gate.open.set()
    assert len(await pair.outputs("a", epoch=2)) == 19
    await pair.nothing_left()


async def test_refusals_leave_nothing_and_say_why(pair: Pair) -> None:
    sequence, ticket = await pair.prefilled(spec())
    await pair.give_back("a")  # as when the lease expires: what was pulled is not to be used
    pair.start(sequence, ticket)
    (lost,) = await pair.outputs("a")
    assert from_sequence_status(lost.failure).code is grpc.StatusCode.ABORTED
    await pair.nothing_left()

    sequence, ticket = await pair.prefilled(spec())
    pair.start(spec("x" * 200, outputs=(1,)), ticket)
    (refused,) = await pair.outputs("x" * 200)
    assert from_sequence_status(refused.failure).fields == ["sequence.request_id"]
    pair.start(sequence, ticket)
    pair.start(sequence, ticket)
    duplicate = (await pair.outputs("a"))[-1]
    assert from_sequence_status(duplicate.failure).code is grpc.StatusCode.ALREADY_EXISTS
    await pair.outputs("a")
    await pair.decode.instance.drain()
    pair.start(sequence, ticket)
    (draining,) = await pair.outputs("a")
    assert from_sequence_status(draining.failure).code is grpc.StatusCode.UNAVAILABLE
    await pair.nothing_left()


async def test_no_room_leaves_the_ticket_good(pair: Pair) -> None:
    sequence, ticket = await pair.prefilled(spec())
    await pair.decode.instance.engine.call(lambda core: core.reserve("other", 1, 250))
    pair.start(sequence, ticket)
    (full,) = await pair.outputs("a")
    status = from_sequence_status(full.failure)
    assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status.retry_delay_s
    await pair.decode.instance.engine.call(lambda core: core.cancel("other"))
    pair.start(sequence, ticket)
    assert len(await pair.outputs("a")) == 19
    await pair.nothing_left()


async def test_a_stop_in_mid_handoff_ends_and_the_router_hears_of_it(pair: Pair) -> None:
    gate = Gate(pair.decode)
    sequence, ticket = await pair.prefilled(spec())
    pair.start(sequence, ticket)
    await asyncio.wait_for(gate.reached.wait(), PATIENCE_S)
    await pair.decode.stop()
    (failure,) = await pair.outputs("a")
    assert from_sequence_status(failure.failure).code is grpc.StatusCode.ABORTED
    await pair.give_back("a")
    await pair.prefill.nothing_left()


def _continued(sequence: SequenceSpec, token_id: int) -> SequenceSpec:
    return SequenceSpec(
        request_id=sequence.request_id,
        epoch=sequence.epoch,
        prompt_token_ids=sequence.prompt_token_ids,
        output_token_ids=(token_id,),
        sampling=sequence.sampling,
    )
