"""The KV pool as bytes: blocks are contiguous, reads are views, writes stay inside their block."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from starmesh.engine.kv_cache import HostKvCache, KvCache
from starmesh.transfer import BlockMemory
from starmesh.types import KvLayout

LAYOUT = KvLayout(model_revision="r", dtype="float32", layers=2, kv_heads=3, head_dim=8, block_tokens=4)


def make_cache(total_blocks: int = 5, dtype: str = "float32") -> HostKvCache:
    layout = KvLayout(model_revision="r", dtype=dtype, layers=2, kv_heads=3, head_dim=8, block_tokens=4)
    cache = KvCache.create(layout, total_blocks, torch.device("cpu"))
    assert isinstance(cache, HostKvCache)
    return cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_block_is_one_contiguous_range(dtype: str) -> None:
    cache = make_cache(dtype=dtype)
    assert cache.pool.shape == (5, 2, 2, 3, 4, 8)
    assert cache.pool.is_contiguous()
    assert len(cache.read_block(0)) == cache.layout.block_bytes == cache.pool[0].nbytes
    assert cache.device_range.size == 5 * cache.layout.block_bytes
    assert cache.device_range.address == cache.pool.data_ptr()
    assert cache.device_range.address % mmap.PAGESIZE == 0


def test_bytes_and_tensor_are_the_same_memory() -> None:
    cache: HostKvCache = make_cache()
    memory: BlockMemory = cache
    view = memory.read_block(3)
    cache.pool[3] = torch.arange(cache.pool[3].numel()).view(cache.pool.shape[1:])
    assert np.frombuffer(view, dtype=np.float32)[17] == 17.0
    memory.write_block(1, 0, view)
    assert torch.equal(cache.pool[1], cache.pool[3])
    memory.write_block(1, 8, np.array([-1.0], dtype=np.float32).tobytes())
    assert cache.pool[1].flatten()[2] == -1.0
    assert not cache.pool[0].any()
    assert not cache.pool[2].any()


def test_reads_cannot_write() -> None:
    view = make_cache().read_block(0)
    assert isinstance(view, memoryview)
    assert view.readonly


@pytest.mark.parametrize("block_id", [-1, 5])
def test_blocks_outside_the_pool_are_refused(block_id: int) -> None:
    cache = make_cache()
    with pytest.raises(ValueError, match="no block"):
        cache.read_block(block_id)
    with pytest.raises(ValueError, match="no block"):
        cache.write_block(block_id, 0, b"")


def test_writes_past_the_end_of_a_block_are_refused() -> None:
    cache = make_cache()
    size = cache.layout.block_bytes
    cache.write_block(0, size - 4, b"abcd")
    for offset, data in ((size - 3, b"abcd"), (-1, b"a"), (size + 1, b"")):
        with pytest.raises(ValueError, match="pass the end"):
            cache.write_block(0, offset, data)
    assert not cache.pool[1].any()


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        make_cache(0)
