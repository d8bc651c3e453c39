"""Real instances in this process, without a model: engine thread, KV transfer over sockets, leases, membership.

Their executor is the checking one, with its "KV" in the memory that is transferred: a block that was pulled wrongly,
too early or not at all changes the tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

import numpy as np

from starmesh.clock import WallClock
from starmesh.engine.batch import BatchItem
from starmesh.engine.engine import HIDDEN_EVERY_TOKENS, EngineConfig, EngineCore, SequenceOutput
from starmesh.instance.instance import Instance
from starmesh.instance.loading import LoadedEngine
from starmesh.instance.settings import EngineSettings
from starmesh.ledger import Ledger
from starmesh.transfer.host_memory import HostMemory
from starmesh.types import Role, SamplingParams, SequenceSpec
from tests.engine.checking_executor import EOS, CheckingExecutor

PATIENCE_S = 20.0


class MemoryExecutor(CheckingExecutor):
    """A checking executor whose blocks can be pulled."""

    def __init__(self, total_blocks: int, block_tokens: int = 4) -> None:
        super().__init__(total_blocks, block_tokens)
        self.memory = HostMemory(self.layout, total_blocks)
        self._words = self.memory.blocks.view(np.uint32)

    def _read(self, item: BatchItem, position: int) -> int:
        index, offset = divmod(position, self.layout.block_tokens)
        return int(self._words[item.block_ids[index], offset])

    def _write(self, item: BatchItem, position: int, value: int) -> None:
        index, offset = divmod(position, self.layout.block_tokens)
        self._words[item.block_ids[index], offset] = value


class Worker(Protocol):
    """What a service hangs on an instance."""

    def deliver(self, outputs: list[SequenceOutput]) -> None: ...

    async def close(self) -> None: ...


class Running:
    """An instance that serves, its worker, and the stop that ends it."""

    def __init__(self, instance: Instance, worker: Any, task: asyncio.Task[None], stop: asyncio.Event) -> None:
        self.instance = instance
        self.worker = worker
        self.task = task
        self._stop = stop

    async def stop(self) -> None:
        """Stop as SIGTERM does, and wait for the end. Fails when it hangs."""
        self._stop.set()
        await asyncio.wait_for(asyncio.shield(self.task), PATIENCE_S)

    @contextmanager
    def no_steps(self) -> Iterator[None]:
        """The engine takes calls but makes no step, once the one that it may be in is over."""
        engine = self.instance.engine
        limit, engine._max_pending_outputs = engine._max_pending_outputs, 0
        try:
            yield
        finally:
            with engine._changed:
                engine._max_pending_outputs = limit
                engine._changed.notify()

    async def nothing_left(self) -> None:
        """Wait until no block, lease or sequence is left."""

        async def empty() -> bool:
            load = await self.instance.engine.call(lambda core: core.load())
            return load.free_blocks == load.total_blocks and not load.sequences and not self.instance.leases

        await until(empty)
        await self.instance.engine.call(lambda core: core.check_integrity())


@asynccontextmanager
async def running_instance(
    role: Role,
    ledger: Ledger,
    make_worker: Callable[[Instance], Worker],
    *,
    executor: CheckingExecutor | None = None,
    max_waiting: int = 256,
    eos_token_ids: frozenset[int] = frozenset([EOS]),
    hidden_every_tokens: int = HIDDEN_EVERY_TOKENS,
    **settings: Any,
) -> AsyncIterator[Running]:
    """An instance with a worker of ``make_worker``, until the context ends."""
    executor = executor or MemoryExecutor(64)
    memory = executor.memory if isinstance(executor, MemoryExecutor) else HostMemory(executor.layout, 64)
    config = EngineConfig(
        eos_token_ids=eos_token_ids,
        max_sequence_tokens=executor.total_blocks * executor.layout.block_tokens,
        max_waiting_sequences=max_waiting,
        prefix_caching=role is Role.PREFILL,
        hidden_every_tokens=hidden_every_tokens,
    )
    core = EngineCore(executor, config, stop_checker=_no_stop_strings, clock=WallClock())
    defaults = {"instance_id": role.value, "transfer": "stream", "report_interval_s": 0.02, "grace_s": 0.2}
    options = EngineSettings(_cli_parse_args=False, **(defaults | settings))
    loaded = LoadedEngine(core, memory, config.max_sequence_tokens, config.max_sequences)
    instance = Instance(options, role, loaded, ledger)
    worker = make_worker(instance)
    stop = asyncio.Event()
    task = asyncio.create_task(instance.run(stop, deliver=worker.deliver, close=worker.close))
    running = Running(instance, worker, task, stop)

    async def registered() -> bool:
        assert not task.done(), task.exception()
        return options.instance_id in {view.info.instance_id for view in (await ledger.view()).instances}

    await until(registered)
    try:
        yield running
    finally:
        await running.stop()


def spec(
    request_id: str = "a",
    *,
    epoch: int = 1,
    prompt: int = 10,
    outputs: tuple[int, ...] = (),
    limit: int = 20,
    ignore_eos: bool = True,
) -> SequenceSpec:
    """A sequence of ``prompt`` tokens that differ from request to request, greedy, to its limit."""
    return SequenceSpec(
        request_id=request_id,
        epoch=epoch,
        prompt_token_ids=tuple(1 + (ord(request_id[0]) + index) % 22 for index in range(prompt)),
        output_token_ids=outputs,
        sampling=SamplingParams(max_output_tokens=limit, temperature=0.0, ignore_eos=ignore_eos),
    )


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait for a condition that no event announces."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.005)


def _no_stop_strings(spec: SequenceSpec) -> Any:
    raise AssertionError("no sequence of these tests has stop strings")
