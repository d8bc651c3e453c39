"""The paged KV pool: one tensor, block-major, that attention reads and writes and other instances pull from.

Owns the memory and its two faces: ``pool`` for the executor, ``BlockMemory`` (bytes of a block) for transfers. Which
sequence holds which block is ``block_pool``'s affair.
"""

from __future__ import annotations

import mmap
import threading

import numpy as np
import torch

from starmesh.types import DeviceRange, KvLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KvCache:
    """``pool`` is [blocks, layers, 2, kv_heads, block_tokens, head_dim] on ``device``, key before value.

    Block-major, so that a block is one contiguous range: one transfer descriptor each. Use ``create``.
    """

    def __init__(self, layout: KvLayout, pool: torch.Tensor) -> None:
        self.layout = layout
        self.pool = pool
        self.total_blocks = pool.shape[0]

    @staticmethod
    def create(layout: KvLayout, total_blocks: int, device: torch.device) -> HostKvCache | CudaKvCache:
        """A zeroed pool. Raises ValueError for no blocks, OSError or torch.OutOfMemoryError when it does not fit."""
        if total_blocks < 1:
            raise ValueError(f"a KV pool needs at least one block (got {total_blocks})")
        return HostKvCache(layout, total_blocks) if device.type == "cpu" else CudaKvCache(layout, total_blocks, device)

    def _check(self, block_id: int, offset: int = 0, size: int = 0) -> None:
        if not 0 <= block_id < self.total_blocks:
            raise ValueError(f"no block {block_id} in a pool of {self.total_blocks}")
        if offset < 0 or offset + size > self.layout.block_bytes:
            raise ValueError(f"bytes {offset} to {offset + size} pass the end of a block ({self.layout.block_bytes})")


def _shape(layout: KvLayout, total_blocks: int) -> tuple[int, ...]:
    return (total_blocks, layout.layers, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)


class HostKvCache(KvCache):
    """A pool in host memory: page-aligned, and pages cost nothing until a block is first written."""

    def __init__(self, layout: KvLayout, total_blocks: int) -> None:
        memory = mmap.mmap(-1, layout.block_bytes * total_blocks)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # a block spans hundreds of small pages: fewer TLB misses
        flat = np.frombuffer(memory, dtype=np.uint8)
        super().__init__(
            layout, torch.from_numpy(flat).view(TORCH_DTYPES[layout.dtype]).view(_shape(layout, total_blocks))
        )
        self._bytes = memoryview(memory)

    @property
    def device_range(self) -> DeviceRange:
        return DeviceRange(address=self.pool.data_ptr(), size=len(self._bytes), memory="DRAM", device=0)

    def read_block(self, block_id: int) -> memoryview:
        """The block's bytes, not copied: valid while the cache lives, stale once the block is written again."""
        self._check(block_id)
        size = self.layout.block_bytes
        return self._bytes[block_id * size : (block_id + 1) * size].toreadonly()

    def write_block(self, block_id: int, offset: int, data: bytes | memoryview) -> None:
        raw = memoryview(data).cast("B")
        self._check(block_id, offset, len(raw))
        begin = block_id * self.layout.block_bytes + offset
        self._bytes[begin : begin + len(raw)] = raw


class CudaKvCache(KvCache):
    """A pool in GPU memory. Transfers pass through pinned staging on a stream of their own.

    Order with the compute stream: a read waits for the steps recorded by ``step_ended`` so far; a step waits in
    ``step_begins`` for the writes issued so far. Nobody reads a block while it is written: leases and reservations of
    the caller see to that.
    """

    def __init__(self, layout: KvLayout, total_blocks: int, device: torch.device) -> None:
        pool = torch.zeros(_shape(layout, total_blocks), dtype=TORCH_DTYPES[layout.dtype], device=device)
        super().__init__(layout, pool)
        self._flat = pool.view(total_blocks, -1).view(torch.uint8)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging = torch.empty(layout.block_bytes, dtype=torch.uint8, pin_memory=True)
        self._stepped = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._written = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()  # one staging buffer
        self._stepped.record(torch.cuda.current_stream(device))

    @property
    def device_range(self) -> DeviceRange:
        index = self.pool.device.index or 0
        return DeviceRange(address=self.pool.data_ptr(), size=self._flat.numel(), memory="VRAM", device=index)

    def step_begins(self) -> None:
        """Order the coming step after every block written so far. Called on the engine's thread."""
        with self._lock:
            torch.cuda.current_stream(self.pool.device).wait_event(self._written)

    def step_ended(self) -> None:
        """Mark the step just launched, for reads to wait on. Called on the engine's thread."""
        with self._lock:
            self._stepped.record(torch.cuda.current_stream(self.pool.device))

    def read_block(self, block_id: int) -> bytes:
        self._check(block_id)
        with self._lock, torch.cuda.stream(self._stream):
            self._stream.wait_event(self._stepped)
            self._staging.copy_(self._flat[block_id], non_blocking=True)
            self._stream.synchronize()
            return self._staging.numpy().tobytes()

    def write_block(self, block_id: int, offset: int, data: bytes | memoryview) -> None:
        raw = np.frombuffer(data, dtype=np.uint8)
        self._check(block_id, offset, len(raw))
        with self._lock, torch.cuda.stream(self._stream):
            self._staging.numpy()[: len(raw)] = raw
            self._flat[block_id, offset : offset + len(raw)].copy_(self._staging[: len(raw)], non_blocking=True)
            self._written.record(self._stream)
            self._stream.synchronize()  # the staging buffer is free again
