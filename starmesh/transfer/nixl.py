"""The NIXL backend: one-sided READs from a holder's registered pool into ours (UCX: shared memory, TCP, RDMA, NVLink).

Owns the agent, its registration of the whole pool, and the READs in flight. Leases and the choice of a backend are
others' business. All native calls are made on one thread, none on the event loop.

What NIXL 1.5 does that shapes this file (observed):

- A READ cannot be taken back. Releasing its handle, or removing the peer, leaves it under way, and its bytes land in
  our blocks when a holder that hung comes back. Only destroying the agent stops it. So a READ past its deadline costs
  us the agent: a new one is made, READs of others that were under way fail, and holders see a new agent name.
- A peer that dies makes its READs fail within milliseconds, and those have ended for good.
- Between processes of one host the copy happens inside ``transfer``, so that call blocks for as long as the copy
  takes: READs are posted in windows, for others to get their turn.
- NIXL's own Python wrapper starts the progress thread with a delay of 0, which spins: a whole core for as long as the
  agent lives. So this file calls the bindings below the wrapper, where the delay can be set.
- Taking in a peer's metadata connects to it, and blocks for as long as TCP tries: minutes where a firewall drops what
  we send. Nothing is read before that, so it is a step of its own that a pull need not wait for.
- A removed peer that is added again at once may fail to connect. Names are new with every incarnation and agent, so
  only a peer that failed comes back under its name, and the puller leaves it alone for a while.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn, ParamSpec, TypeVar

from starmesh.transfer import BlockMemory, TransferError
from starmesh.transfer.worker_thread import to_its_end
from starmesh.v1 import transfer_pb2

log = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

WINDOW_BYTES = 64 * 1024 * 1024
"""Bytes of a READ at most: about 20 ms of one core's copying."""

TURN_S = 0.005
"""How long one READ is watched before the thread looks after the others."""

POLL_S = 0.0002
"""Time between two looks at a READ."""

PROGRESS_INTERVAL_US = 10_000
"""How often the progress thread looks around by itself; it wakes at once for what arrives."""

CONNECT_TIMEOUT_S = 5.0
"""How long a pull waits for a connection to its peer before it goes another way."""

CANCEL_GRACE_S = 1.0
"""How long a cancelled READ may take to end by itself before the agent is given up."""


class NixlError(TransferError):
    """NIXL failed between two agents; another backend may still reach the peer."""


def load_nixl() -> ModuleType | None:
    """NIXL's bindings, None where no wheel of it is installed. The wheels differ in CUDA's version only."""
    # NIXL and UCX report set-ups and lost peers on their own. What fails reaches us as an exception: let them be quiet.
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    for name in ("nixl._bindings", "nixl_cu12._bindings", "nixl_cu13._bindings"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def merge_runs(block_ids: Sequence[int], local_block_ids: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Pair blocks one to one, and merge pairs that continue on both sides: (remote first, local first, blocks)."""
    start = 0
    for index in range(1, len(block_ids) + 1):
        if index == len(block_ids) or (
            block_ids[index] != block_ids[index - 1] + 1 or local_block_ids[index] != local_block_ids[index - 1] + 1
        ):
            yield block_ids[start], local_block_ids[start], index - start
            start = index


@dataclass(slots=True, eq=False)
class _Read:
    """One pull's READs, a window at a time. ``handle`` is set while one is under way."""

    peer: transfer_pb2.NixlEndpoint
    deadline_s: float
    handle: int | None = None

    def hurry(self) -> None:
        self.deadline_s = min(self.deadline_s, time.monotonic() + CANCEL_GRACE_S)


class NixlAgent:
    """One instance's NIXL agent, with its whole pool registered: read by others, and reading from others."""

    def __init__(self, api: ModuleType, memory: BlockMemory, name: str) -> None:
        """Made by ``open``. ``name`` is unique in the cluster."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nixl")
        self._native = _NativeAgent(api, memory, name)
        self._connecting: tuple[str, asyncio.Future[None]] | None = None
        self._unwanted: set[str] = set()

    @classmethod
    async def open(cls, api: ModuleType, memory: BlockMemory, name: str) -> NixlAgent:
        """Start an agent and register the pool. Raises NixlError when NIXL can't (no UCX, memory it can't pin)."""
        agent = cls(api, memory, name)
        try:
            await agent._call(agent._native.start)
        except NixlError:
            agent._thread.shutdown(wait=False)
            raise
        return agent

    def endpoint(self) -> transfer_pb2.NixlEndpoint:
        """What a peer needs to read from this pool, as of now."""
        return self._native.endpoint

    async def read(
        self,
        peer: transfer_pb2.NixlEndpoint,
        block_ids: Sequence[int],
        local_block_ids: Sequence[int],
        *,
        timeout_s: float,
    ) -> None:
        """Copy the peer's ``block_ids`` into ``local_block_ids``, one to one.

        Raises NixlError. Once it has returned or raised, cancelled or not, nothing more is written; a cancelled READ
        may take CANCEL_GRACE_S to get there.
        """
        # A peer to forget whose turn has not come yet, say behind a connection that hung, is wanted again.
        self._unwanted.discard(peer.agent)
        read = _Read(peer, time.monotonic() + timeout_s)
        await to_its_end(self._read(read, block_ids, local_block_ids), on_cancel=read.hurry)

    async def forget(self, agent_name: str) -> None:
        """Disconnect from a peer's agent once no READ from it is under way, and no connection is tried; not where a
        READ from it is asked for before that."""

        def forget() -> None:
            if agent_name in self._unwanted:
                self._unwanted.discard(agent_name)
                self._native.forget(agent_name)

        self._unwanted.add(agent_name)
        forgetting = asyncio.ensure_future(self._call(forget))
        if not self._stuck:
            await forgetting

    async def close(self) -> None:
        """Stop the agent: READs under way fail, the memory is deregistered. One that still tries to connect is left to
        the end of the process."""
        if not self._stuck:
            await self._call(self._native.stop)
        self._thread.shutdown(wait=False)

    async def _read(self, read: _Read, block_ids: Sequence[int], local_block_ids: Sequence[int]) -> None:
        await self._connect(read.peer)
        window = max(1, WINDOW_BYTES // read.peer.block_bytes)
        for start in range(0, len(block_ids), window):
            runs = merge_runs(block_ids[start : start + window], local_block_ids[start : start + window])
            await self._call(self._native.post, read, list(runs))
            while not await self._call(self._native.watch, read):
                pass

    @property
    def _stuck(self) -> bool:
        """Whether the thread tries to connect, for nobody knows how long."""
        return self._connecting is not None and not self._connecting[1].done()

    async def _connect(self, peer: transfer_pb2.NixlEndpoint) -> None:
        """Connect to a peer, after others that do. Raises NixlError after CONNECT_TIMEOUT_S; the thread may try on, and
        all pulls that need it are told so at once or as late."""
        deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
        while not self._native.connected(peer):
            if self._connecting is None or self._connecting[1].done():
                self._connecting = (peer.agent, asyncio.ensure_future(self._call(self._native.connect, peer)))
            name, attempt = self._connecting
            await asyncio.wait([attempt], timeout=max(0.0, deadline_s - time.monotonic()))
            if not attempt.done():
                raise NixlError(
                    f"no connection to {name} after {CONNECT_TIMEOUT_S:g} s; do firewalls let its ports through?"
                )
            if name == peer.agent:
                attempt.result()

    async def _call(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        def run() -> Result:
            return function(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)


class _NativeAgent:
    """The agent as its one thread sees it: blocking calls, no locks."""

    def __init__(self, api: ModuleType, memory: BlockMemory, name: str) -> None:
        self._api = api
        self._name = name
        self._range = memory.device_range
        self._block_bytes = memory.layout.block_bytes
        self._segments = {"DRAM": api.DRAM_SEG, "VRAM": api.VRAM_SEG}
        self._generation = 0
        self._agent: Any = None
        self._peers: set[str] = set()
        self._forgotten: set[str] = set()
        self._reads: set[_Read] = set()
        self.endpoint = transfer_pb2.NixlEndpoint()

    def start(self) -> None:
        self._generation += 1
        name = f"{self._name}/{self._generation}"
        config = self._api.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_INTERVAL_US
        pool = (self._range.address, self._range.size, self._range.device, "")
        try:
            agent = self._api.nixlAgent(name, config)
            agent.createBackend("UCX", {})
            agent.registerMem(self._api.nixlRegDList(self._segments[self._range.memory], [pool]), [])
            metadata = agent.getLocalMD()
        except Exception as error:
            raise NixlError(f"NIXL does not start ({error!r}); run with the stream backend only") from error
        self._agent = agent
        self.endpoint = transfer_pb2.NixlEndpoint(
            agent=name,
            metadata=metadata,
            base_address=self._range.address,
            block_bytes=self._block_bytes,
            memory=self._range.memory,
            device=self._range.device,
        )

    def stop(self) -> None:
        """Destroy the agent, and with it what is under way."""
        for read in self._reads:
            self._release(read)
        self._reads.clear()
        self._peers.clear()
        self._forgotten.clear()
        self._agent = None  # the only reference

    def connected(self, peer: transfer_pb2.NixlEndpoint) -> bool:
        """Whether ``connect`` has succeeded, and nothing has ended the connection since. From any thread."""
        return peer.agent in self._peers

    def connect(self, peer: transfer_pb2.NixlEndpoint) -> None:
        """Connect to a peer; may block for minutes. Raises NixlError."""
        if self._agent is None:
            self.start()
        try:
            self._agent.loadRemoteMD(peer.metadata)
        except Exception as error:
            raise NixlError(f"connecting to {peer.agent}: {error!r}") from error
        self._peers.add(peer.agent)

    def post(self, read: _Read, runs: Sequence[tuple[int, int, int]]) -> None:
        """Start a READ of (remote first, local first, blocks). Raises NixlError."""
        if not self.connected(read.peer):
            raise NixlError(f"READ from {read.peer.agent}: the connection has ended")
        peer, size = read.peer, self._block_bytes
        self._forgotten.discard(peer.agent)
        ours = [(self._range.address + local * size, blocks * size, self._range.device) for _, local, blocks in runs]
        theirs = [(peer.base_address + first * size, blocks * size, peer.device) for first, _, blocks in runs]
        try:
            read.handle = self._agent.createXferReq(
                self._api.NIXL_READ,
                self._api.nixlXferDList(self._segments[self._range.memory], ours),
                self._api.nixlXferDList(self._segments[peer.memory], theirs),
                peer.agent,
                b"",
                [],
            )
        except Exception as error:
            self.forget(peer.agent)
            raise NixlError(f"READ from {peer.agent}: {error!r}") from error
        self._reads.add(read)
        try:
            self._agent.postXferReq(read.handle, b"")
        except Exception as error:
            self._fail(read, error)

    def watch(self, read: _Read) -> bool:
        """Watch a READ for a turn. Returns whether it is done; raises NixlError when it failed or its time is up."""
        if read not in self._reads:
            raise NixlError(f"READ from {read.peer.agent}: the local agent was restarted")
        until_s = time.monotonic() + TURN_S
        try:
            while (status := self._agent.getXferStatus(read.handle)) == self._api.NIXL_IN_PROG:
                now_s = time.monotonic()
                if now_s >= read.deadline_s:
                    raise TimeoutError("its time is up")
                if now_s >= until_s:
                    return False
                time.sleep(POLL_S)
            if status != self._api.NIXL_SUCCESS:
                raise RuntimeError(f"status {status}")
        except Exception as error:
            self._fail(read, error)
        self._end(read)
        return True

    def forget(self, agent_name: str) -> None:
        """Remove a peer once no READ from it is under way."""
        self._forgotten.add(agent_name)
        self._remove_forgotten()

    def _fail(self, read: _Read, error: Exception) -> NoReturn:
        """End a READ that failed; where bytes of it may still come, end the agent too. Raises NixlError."""
        if isinstance(error, self._api.nixlRemoteDisconnectError):
            self._end(read)
            self.forget(read.peer.agent)
        else:
            log.warning("restarting NIXL: a READ from %s did not end (%s)", read.peer.agent, error)
            self.stop()
            self.start()
        raise NixlError(f"READ from {read.peer.agent}: {error!r}") from error

    def _end(self, read: _Read) -> None:
        self._release(read)
        self._reads.discard(read)
        self._remove_forgotten()

    def _release(self, read: _Read) -> None:
        try:
            self._agent.releaseXferReq(read.handle)
        except Exception as error:  # still under way; the agent's end takes care of it
            log.debug("releasing a READ from %s: %r", read.peer.agent, error)
        read.handle = None

    def _remove_forgotten(self) -> None:
        for name in self._forgotten - {read.peer.agent for read in self._reads}:
            self._forgotten.remove(name)
            if name in self._peers:
                self._peers.remove(name)
                try:
                    self._agent.invalidateRemoteMD(name)
                except Exception as error:  # it is gone, which is what was asked for
                    log.debug("removing NIXL peer %s: %r", name, error)
