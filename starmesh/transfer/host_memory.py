"""A KV pool in host memory, held by numpy: for engines that compute nothing, for benchmarks and for tests."""

from __future__ import annotations

import mmap
import sys

import numpy as np
from numpy.typing import NDArray

from starmesh.transfer import DeviceRange
from starmesh.types import KvLayout

# Python names it from 3.13 on; without it Linux refuses a pool larger than the machine's memory, however little of it
# is ever written.
_MAP_NORESERVE = 0x4000


class HostMemory:
    """``total_blocks`` blocks of zeros, block-major; implements ``BlockMemory``. Pages cost nothing until they are
    written.

    ``blocks`` is the pool itself, [total_blocks, layout.block_bytes] of uint8.
    """

    def __init__(self, layout: KvLayout, total_blocks: int) -> None:
        self.layout = layout
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sys.platform == "linux" else 0)
        memory = mmap.mmap(-1, total_blocks * layout.block_bytes, flags=flags)
        self.blocks: NDArray[np.uint8] = np.frombuffer(memory, np.uint8).reshape(total_blocks, layout.block_bytes)

    @property
    def device_range(self) -> DeviceRange:
        """The whole pool."""
        return DeviceRange(address=self.blocks.ctypes.data, size=self.blocks.nbytes, memory="DRAM", device=0)

    def read_block(self, block_id: int) -> memoryview:
        """A view of a block. Raises ValueError for a block that does not exist."""
        return memoryview(self.blocks[self._checked(block_id)])

    def write_block(self, block_id: int, offset: int, data: bytes | memoryview) -> None:
        """Overwrite part of a block. Raises ValueError past its end or for a block that does not exist."""
        end = offset + len(data)
        if offset < 0 or end > self.layout.block_bytes:
            raise ValueError(f"bytes {offset} to {end} do not lie in a block of {self.layout.block_bytes}")
        self.blocks[self._checked(block_id), offset:end] = np.frombuffer(data, np.uint8)

    def _checked(self, block_id: int) -> int:
        if not 0 <= block_id < len(self.blocks):
            raise ValueError(f"block {block_id} is not one of the pool's {len(self.blocks)}")
        return block_id
