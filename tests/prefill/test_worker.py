"""Prefill on a real engine: whatever is cancelled, refused or superseded, no block and no lease is left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from services.prefill.worker import Prefilled, PrefillFailed, PrefillWorker, WrongModel
from starmesh.clock import WallClock
from starmesh.engine.engine import EngineCore, SequenceOutput
from starmesh.engine.scheduler import CapacityError, DuplicateRequest, QueueFull
from starmesh.ledger.memory import MemoryLedger
from starmesh.types import Role, SequenceSpec
from tests.engine.checking_executor import HIDDEN_LAYOUT, hidden_state, reference_tokens
from tests.engine.test_thread import GatedExecutor
from tests.instance.running import Running, running_instance, spec


@pytest.fixture
async def prefill() -> AsyncIterator[Running]:
    async with running_instance(Role.PREFILL, MemoryLedger(WallClock()), PrefillWorker) as running:
        yield running


def drop(prefill: Running, done: Prefilled) -> None:
    """End a lease as a puller does."""
    assert done.ticket is not None
    transfer = prefill.instance.transfer
    prefill.instance._on_lease_end(transfer.leases.release(done.ticket.lease_id, now_s=transfer.clock.now_s()))


def hold(core: EngineCore, older: SequenceSpec) -> None:
    """Hold a sequence that the queue would refuse."""
    core.reserve(older.request_id, older.epoch, older.tokens)
    core.start(older, 0)
    core.export(older.request_id)


async def test_the_first_token_comes_with_leased_blocks(prefill: Running) -> None:
    done = await prefill.worker.prefill(spec(), "checking")
    assert done.token_id == reference_tokens(spec().prompt_token_ids, 1)[0]
    assert done.ticket.resident_tokens == 10
    assert len(done.ticket.block_ids) == 3
    drop(prefill, done)
    await prefill.nothing_left()


async def test_the_hidden_state_at_the_last_token_comes_along(prefill: Running) -> None:
    """Of the prompt's or, of a recovered sequence, of its outputs'; not of one that goes on to its limit anyway."""
    for sequence in (predicted(spec("a")), predicted(spec("b", outputs=(5, 6, 7)))):
        done = await prefill.worker.prefill(sequence, "checking")
        expected = hidden_state([*sequence.prompt_token_ids, *sequence.output_token_ids])
        assert np.array_equal(np.frombuffer(done.hidden_state, "<f2").reshape(2, 3), expected)
        assert done.hidden_layout == HIDDEN_LAYOUT
        assert len(done.hidden_state) == HIDDEN_LAYOUT.state_bytes
        drop(prefill, done)
    ignoring = await prefill.worker.prefill(spec("c"), "checking")
    assert (ignoring.hidden_state, ignoring.hidden_layout) == (b"", None)
    drop(prefill, ignoring)
    ended = await prefill.worker.prefill(predicted(spec("d", limit=1)), "checking")
    assert (ended.hidden_state, ended.hidden_layout) == (b"", None)
    await prefill.nothing_left()


def predicted(sequence: SequenceSpec) -> SequenceSpec:
    return replace(sequence, sampling=replace(sequence.sampling, ignore_eos=False))


async def test_a_sequence_that_ends_at_once_leaves_nothing(prefill: Running) -> None:
    done = await prefill.worker.prefill(spec(limit=1), "checking")
    assert done.ticket is None
    await prefill.nothing_left()


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_at_any_await(prefill: Running, turns: int) -> None:
    task = asyncio.create_task(prefill.worker.prefill(spec(), "checking"))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        drop(prefill, await task)  # it was done already
    await prefill.nothing_left()


async def test_cancelled_in_its_step() -> None:
    executor = GatedExecutor()
    async with running_instance(Role.PREFILL, MemoryLedger(WallClock()), PrefillWorker, executor=executor) as prefill:
        task = asyncio.create_task(prefill.worker.prefill(spec(), "checking"))
        await executor.in_step()
        task.cancel()
        executor.gate.release()
        with pytest.raises(asyncio.CancelledError):
            await task
        await prefill.nothing_left()


async def test_what_is_refused_leaves_nothing(prefill: Running) -> None:
    with pytest.raises(CapacityError):
        await prefill.worker.prefill(spec(prompt=1000), "checking")
    with pytest.raises(WrongModel):
        await prefill.worker.prefill(spec(), "other")
    done = await prefill.worker.prefill(spec(), "checking")
    with pytest.raises(DuplicateRequest):
        await prefill.worker.prefill(spec(), "checking")
    drop(prefill, done)
    await prefill.nothing_left()


async def test_a_newer_epoch_ends_the_older_ones_lease(prefill: Running) -> None:
    await prefill.worker.prefill(spec(epoch=1), "checking")
    done = await prefill.worker.prefill(spec(epoch=2), "checking")
    assert prefill.instance.leases == 1
    drop(prefill, done)
    await prefill.nothing_left()


async def test_a_newer_epoch_that_is_refused_leaves_none_of_the_older_ones_blocks() -> None:
    """Their lease is over by then: nobody else would free them."""
    ledger = MemoryLedger(WallClock())
    async with running_instance(Role.PREFILL, ledger, PrefillWorker, max_waiting=0) as prefill:
        older = spec(epoch=1)
        await prefill.instance.engine.call(lambda core: hold(core, older))
        prefill.instance.lease(older, (0, 1, 2), 10)
        with pytest.raises(QueueFull):
            await prefill.worker.prefill(spec(epoch=2), "checking")
        await prefill.nothing_left()


@pytest.mark.parametrize("turns", range(1, 8))
async def test_epochs_that_overtake_each_other_never_share_blocks(prefill: Running, turns: int) -> None:
    older = asyncio.create_task(prefill.worker.prefill(spec(epoch=1), "checking"))
    for _ in range(turns):
        await asyncio.sleep(0)
    done = await prefill.worker.prefill(spec(epoch=2), "checking")
    (result,) = await asyncio.gather(older, return_exceptions=True)
    assert isinstance(result, (Prefilled, PrefillFailed))
    assert prefill.instance.leases == 1, "the older epoch's lease is over"
    held, _ = await prefill.instance.engine.call(lambda core: core.held("a"))
    assert held == done.ticket.block_ids
    drop(prefill, done)
    await prefill.nothing_left()


async def test_an_older_epoch_that_comes_to_itself_late_leases_nothing() -> None:
    """A newer one comes between its output and the lease, and frees its blocks."""
    executor = GatedExecutor()
    async with running_instance(Role.PREFILL, MemoryLedger(WallClock()), PrefillWorker, executor=executor) as prefill:
        worker, instance = prefill.worker, prefill.instance
        older = asyncio.create_task(worker.prefill(spec(epoch=1), "checking"))
        await executor.in_step()
        newer: list[asyncio.Task[Prefilled]] = []

        def deliver(outputs: list[SequenceOutput]) -> None:
            # Runs before the older one, which hears of its output after this.
            newer.append(asyncio.create_task(worker.prefill(spec(epoch=2), "checking")))
            instance._deliver = worker.deliver
            worker.deliver(outputs)

        instance._deliver = deliver
        # For the newer one's steps too: what drops the older one may come to the engine's thread after such a step.
        executor.gate.release(8)
        (result,) = await asyncio.gather(older, return_exceptions=True)
        assert isinstance(result, PrefillFailed)
        done = await newer[0]
        assert prefill.instance.leases == 1
        drop(prefill, done)
        await prefill.nothing_left()


async def test_a_newer_epoch_ends_the_lease_of_an_older_one() -> None:
    """The older one hears of its output first."""
    executor = GatedExecutor()
    async with running_instance(Role.PREFILL, MemoryLedger(WallClock()), PrefillWorker, executor=executor) as prefill:
        worker = prefill.worker
        older = asyncio.create_task(worker.prefill(spec(epoch=1), "checking"))
        await executor.in_step()
        executor.gate.release()
        await older
        newer = asyncio.create_task(worker.prefill(spec(epoch=2), "checking"))
        executor.gate.release()
        done = await newer
        assert prefill.instance.leases == 1
        drop(prefill, done)
        await prefill.nothing_left()
