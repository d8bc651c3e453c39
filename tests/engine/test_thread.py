"""The engine's thread: order, cancellation, backlog, and the ways in which it ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from starmesh.engine.batch import Batch, StepResult
from starmesh.engine.block_pool import IntegrityError
from starmesh.engine.engine import EngineCore, SequenceOutput
from starmesh.engine.thread import EngineStopped, EngineThread
from tests.engine.checking_executor import CheckingExecutor, reference_tokens
from tests.engine.test_engine import LONG_PROMPT, engine, spec, tokens_of

pytestmark = pytest.mark.fast

PATIENCE_S = 20.0


class GatedExecutor(CheckingExecutor):
    """Stops at the start of each step until it is let through."""

    def __init__(self) -> None:
        super().__init__(100)
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def execute(self, batch: Batch) -> StepResult:
        self.entered.release()
        assert self.gate.acquire(timeout=PATIENCE_S)
        return super().execute(batch)

    async def in_step(self) -> None:
        assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE_S)


class Collector:
    """Keeps outputs, and wakes who waits for them."""

    def __init__(self) -> None:
        self.outputs: list[SequenceOutput] = []
        self._arrived = asyncio.Event()

    def __call__(self, outputs: list[SequenceOutput]) -> None:
        self.outputs += outputs
        self._arrived.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._arrived.clear()
                await self._arrived.wait()

    def finished(self, request_id: str) -> bool:
        return any(output.request_id == request_id and output.finish_reason for output in self.outputs)


@asynccontextmanager
async def running(thread: EngineThread) -> AsyncIterator[EngineThread]:
    await thread.start()
    try:
        yield thread
    finally:
        await asyncio.wait_for(thread.stop(), PATIENCE_S)


async def test_outputs_arrive_in_order_on_the_event_loop_and_the_engine_off_it() -> None:
    threads: set[int] = set()
    collector = Collector()

    def on_outputs(outputs: list[SequenceOutput]) -> None:
        assert asyncio.get_running_loop() is loop
        collector(outputs)

    def factory() -> EngineCore:
        threads.add(threading.get_ident())
        return engine()

    loop = asyncio.get_running_loop()
    async with running(EngineThread(factory, on_outputs)) as thread:
        await thread.call(lambda core: core.add(spec("a")))
        await thread.call(lambda core: core.add(spec("b")))
        threads.add(await thread.call(lambda core: threading.get_ident()))
        await collector.until(lambda: collector.finished("a") and collector.finished("b"))
        assert tokens_of(collector.outputs, "a") == reference_tokens(LONG_PROMPT, 20)
        assert tokens_of(collector.outputs, "b") == reference_tokens(LONG_PROMPT, 20)
        assert len(threads) == 1
        assert threading.get_ident() not in threads


async def test_a_call_returns_or_raises_and_the_engine_goes_on() -> None:
    async with running(EngineThread(engine, Collector())) as thread:
        with pytest.raises(ZeroDivisionError):
            await thread.call(lambda core: 1 // 0)
        assert await thread.call(lambda core: core.idle) is True


async def test_a_cancel_is_carried_out_after_the_step_in_progress_and_ends_the_outputs() -> None:
    executor, collector = GatedExecutor(), Collector()
    async with running(EngineThread(lambda: engine(executor), collector)) as thread:
        await thread.call(lambda core: core.add(spec(prompt=(1, 2))))
        await executor.in_step()
        cancel = asyncio.create_task(thread.call(lambda core: core.cancel("a")))
        await asyncio.sleep(0)  # now it is in the queue
        executor.gate.release()
        assert await asyncio.wait_for(cancel, PATIENCE_S)
        assert len(tokens_of(collector.outputs)) == 1  # delivered before the call returned
        assert await thread.call(lambda core: core.idle)
        assert executor.steps == 1


async def test_a_call_cancelled_before_its_turn_never_runs() -> None:
    executor = GatedExecutor()
    ran: list[str] = []
    async with running(EngineThread(lambda: engine(executor), Collector())) as thread:
        await thread.call(lambda core: core.add(spec(prompt=(1, 2), max_output_tokens=1)))
        await executor.in_step()
        first = asyncio.create_task(thread.call(lambda core: ran.append("first")))
        second = asyncio.create_task(thread.call(lambda core: ran.append("second")))
        await asyncio.sleep(0)  # now both are in the queue
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        executor.gate.release()
        await asyncio.wait_for(second, PATIENCE_S)
        assert ran == ["second"]


async def test_calls_beyond_the_bound_wait_for_a_place() -> None:
    executor = GatedExecutor()
    async with running(EngineThread(lambda: engine(executor), Collector(), max_pending_calls=2)) as thread:
        await thread.call(lambda core: core.add(spec(prompt=(1, 2), max_output_tokens=1)))
        await executor.in_step()
        order: list[int] = []

        async def call(number: int) -> None:
            await thread.call(lambda core: order.append(number))

        calls = [asyncio.create_task(call(number)) for number in range(5)]
        await asyncio.sleep(0)
        assert len(thread._calls) == 2
        executor.gate.release()
        await asyncio.wait_for(asyncio.gather(*calls), PATIENCE_S)
        assert order == list(range(5))


async def test_the_engine_waits_for_a_slow_event_loop_but_still_takes_calls() -> None:
    executor, collector = GatedExecutor(), Collector()
    async with running(EngineThread(lambda: engine(executor), collector, max_pending_outputs=3)) as thread:
        executor.gate.release(100)
        thread._enqueue(lambda core: core.add(spec(prompt=(1, 2))))
        # The event loop is kept from running here, as when it has fallen behind.
        for _ in range(3):
            assert executor.entered.acquire(timeout=PATIENCE_S)
        for _ in range(3):
            assert thread._enqueue(lambda core: executor.steps).result(PATIENCE_S) == 3
        await collector.until(lambda: collector.finished("a"))
        assert tokens_of(collector.outputs) == reference_tokens((1, 2), 20)


async def test_a_stalled_engine_sleeps_until_a_call_frees_blocks() -> None:
    executor, collector = CheckingExecutor(6), Collector()
    async with running(EngineThread(lambda: engine(executor), collector)) as thread:
        await thread.call(lambda core: core.add(spec("held"), hold=True))
        await collector.until(lambda: bool(collector.outputs))
        await thread.call(lambda core: core.add(spec("waiting", (1, 2, 3, 4, 5), max_output_tokens=2)))
        assert not await thread.call(lambda core: core.step() or core.runnable)
        await thread.call(lambda core: core.release("held"))
        await collector.until(lambda: collector.finished("waiting"))


async def test_start_raises_what_the_factory_raises() -> None:
    def factory() -> EngineCore:
        raise FileNotFoundError("no such model; fetch it first")

    thread = EngineThread(factory, Collector())
    with pytest.raises(FileNotFoundError, match="fetch it"):
        await thread.start()
    await asyncio.wait_for(thread.stop(), PATIENCE_S)
    with pytest.raises(EngineStopped):
        await thread.call(lambda core: None)


async def test_a_start_that_is_cancelled_ends_the_thread() -> None:
    gate = threading.Event()

    def factory() -> EngineCore:
        assert gate.wait(PATIENCE_S)
        return engine()

    thread = EngineThread(factory, Collector())
    start = asyncio.create_task(thread.start())
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    gate.set()
    await asyncio.wait_for(thread.stop(), PATIENCE_S)
    assert not thread.failed.done()


def break_books(core: EngineCore) -> None:
    core._pool.allocate(1)


async def test_broken_books_stop_the_engine_and_are_reported() -> None:
    thread = EngineThread(engine, Collector())
    await thread.start()
    await thread.call(break_books)
    with pytest.raises(IntegrityError):
        await thread.call(lambda core: core.cancel("a"))
    error = await asyncio.wait_for(thread.failed, PATIENCE_S)
    assert isinstance(error, IntegrityError)
    with pytest.raises(EngineStopped):
        await thread.call(lambda core: None)
    await asyncio.wait_for(thread.stop(), PATIENCE_S)


async def test_a_crash_fails_the_calls_that_wait() -> None:
    executor = GatedExecutor()
    thread = EngineThread(lambda: engine(executor), Collector())
    await thread.start()
    await thread.call(break_books)
    await thread.call(lambda core: core.add(spec(prompt=(1, 2), max_output_tokens=1)))
    await executor.in_step()
    waiting = asyncio.create_task(thread.call(lambda core: None))
    await asyncio.sleep(0)
    executor.gate.release()
    with pytest.raises(EngineStopped):
        await asyncio.wait_for(waiting, PATIENCE_S)
    assert isinstance(await asyncio.wait_for(thread.failed, PATIENCE_S), IntegrityError)


async def test_outputs_that_cannot_be_delivered_stop_the_engine() -> None:
    def on_outputs(outputs: list[SequenceOutput]) -> None:
        raise RuntimeError("nowhere to put them")

    thread = EngineThread(engine, on_outputs)
    await thread.start()
    await thread.call(lambda core: core.add(spec()))
    assert "nowhere" in str(await asyncio.wait_for(thread.failed, PATIENCE_S))
    await asyncio.wait_for(thread.stop(), PATIENCE_S)


async def test_stop_ends_calls_in_the_queue_and_may_be_repeated() -> None:
    executor = GatedExecutor()
    thread = EngineThread(lambda: engine(executor), Collector())
    await thread.stop()  # before the start, too
    await thread.start()
    await thread.call(lambda core: core.add(spec(prompt=(1, 2))))
    await executor.in_step()
    waiting = asyncio.create_task(thread.call(lambda core: None))
    await asyncio.sleep(0)
    stop = asyncio.create_task(thread.stop())
    await asyncio.sleep(0)
    executor.gate.release()
    await asyncio.wait_for(stop, PATIENCE_S)
    with pytest.raises(EngineStopped):
        await waiting
    await thread.stop()
    assert not thread.failed.done()
