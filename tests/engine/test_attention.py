"""Native and torch attention against a plain one that knows nothing of blocks; and the native build itself."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from starmesh.engine import native
from starmesh.engine.attention import RaggedBatch, can_attend, paged_step
from starmesh.engine.batch import BatchItem
from starmesh.engine.kv_cache import TORCH_DTYPES, KvCache
from starmesh.types import KvLayout

LAYERS = 2
WAYS = pytest.mark.parametrize("way", ["native", "torch"])


def library_for(way: str) -> native.NativeLibrary | None:
    if way == "torch":
        return None
    library = native.library()
    if library is None:
        pytest.skip("no C++ compiler here")
    return library


def plain_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scale: float, softcap: float, window: int
) -> torch.Tensor:
    """[heads, queries, dim] of the last queries over [kv_heads, tokens, dim], in double precision."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, dim=0) for x in (keys, values))
    scores = query.double() @ keys.transpose(1, 2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    tokens, queries = keys.shape[1], query.shape[1]
    age = torch.arange(tokens - queries, tokens)[:, None] - torch.arange(tokens)
    visible = (age >= 0) & (age < window if window else True)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values


def check(
    way: str,
    *,
    lengths: list[tuple[int, int]],
    kv_heads: int = 2,
    group: int = 3,
    head_dim: int = 32,
    block_tokens: int = 16,
    softcap: float = 0.0,
    window: int = 0,
    dtype: str = "float32",
    seed: int = 0,
) -> None:
    """``lengths``: for each sequence, the tokens whose KV is there already and the tokens of this step."""
    generator = torch.Generator().manual_seed(seed)
    library = library_for(way)
    layout = KvLayout("r", dtype, LAYERS, kv_heads, head_dim, block_tokens)
    tables_needed = [-(-(past + new) // block_tokens) for past, new in lengths]
    cache = KvCache.create(layout, sum(tables_needed) + 3, torch.device("cpu"))
    cache.pool.fill_(torch.nan)  # whatever is not this step's or the past must not be read
    blocks = (torch.randperm(cache.total_blocks, generator=generator)).tolist()
    tables = [[blocks.pop() for _ in range(needed)] for needed in tables_needed]
    heads, torch_dtype, layer = kv_heads * group, TORCH_DTYPES[dtype], 1

    def draw(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, count, head_dim, generator=generator).to(torch_dtype).transpose(1, 2)

    def run(parts: list[tuple[int, int]], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        items = [BatchItem("r", [0] * n, s, table) for (s, n), table in zip(parts, tables, strict=True) if n]
        batch = RaggedBatch.of(items, block_tokens=block_tokens, total_blocks=cache.total_blocks)
        step = paged_step(batch, cache, query_heads=heads, threads=1, library=library)
        return step.attend(layer, q, k, v, scale=0.2, softcap=softcap, window=window)

    if library is not None:
        assert can_attend(library, cache)
    pasts = [past for past, _ in lengths]
    past_keys, past_values = draw(kv_heads, sum(pasts)), draw(kv_heads, sum(pasts))
    if sum(pasts):
        run([(0, past) for past in pasts], draw(heads, sum(pasts)), past_keys, past_values)
    total = sum(new for _, new in lengths)
    query, key, value = draw(heads, total), draw(kv_heads, total), draw(kv_heads, total)
    output = run(lengths, query, key, value)
    assert output.shape == (1, total, heads, head_dim)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    past_at = new_at = 0
    for past, new in lengths:
        keys = torch.cat((past_keys[0, :, past_at : past_at + past], key[0, :, new_at : new_at + new]), dim=1)
        values = torch.cat((past_values[0, :, past_at : past_at + past], value[0, :, new_at : new_at + new]), dim=1)
        wanted = plain_attention(
            query[0, :, new_at : new_at + new], keys, values, scale=0.2, softcap=softcap, window=window
        )
        ours = output[0, new_at : new_at + new].transpose(0, 1)
        torch.testing.assert_close(ours.double(), wanted, rtol=tolerance, atol=tolerance)
        past_at, new_at = past_at + past, new_at + new


@WAYS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (1.5, 0), (0.0, 5), (0.0, 70), (1.5, 17)])
def test_mixed_steps(way: str, dtype: str, softcap: float, window: int) -> None:
    lengths = [(0, 1), (130, 1), (0, 40), (63, 2), (64, 1), (17, 75), (5, 1)]
    check(way, lengths=lengths, dtype=dtype, softcap=softcap, window=window)


@WAYS
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(1, 1, 16), (3, 3, 64), (1, 8, 256), (4, 1, 80), (2, 5, 48)]
)
def test_head_shapes(way: str, kv_heads: int, group: int, head_dim: int) -> None:
    check(way, lengths=[(70, 1), (3, 30)], kv_heads=kv_heads, group=group, head_dim=head_dim)


@WAYS
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=5),
    block_tokens=st.sampled_from([1, 4, 16, 48]),
    window=st.sampled_from([0, 1, 9, 64, 100]),
    seed=st.integers(0, 99),
)
def test_any_ragged_batch(way: str, lengths: list[tuple[int, int]], block_tokens: int, window: int, seed: int) -> None:
    check(way, lengths=lengths, block_tokens=block_tokens, window=window, seed=seed)


def test_unusual_heads_go_to_torch() -> None:
    library = library_for("native")
    assert library is not None
    for head_dim, dtype in ((24, "float32"), (512, "float32"), (64, "float16")):
        cache = KvCache.create(KvLayout("r", dtype, 1, 1, head_dim, 16), 1, torch.device("cpu"))
        assert can_attend(library, cache) == (head_dim % library.lanes == 0 and head_dim != 512 and dtype != "float16")


def test_processes_that_build_together_end_with_one_library(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: native.compiled(compiler, tmp_path), range(2))
    assert first == second
    assert list(tmp_path.iterdir()) == [first]
    built_at = first.stat().st_mtime_ns
    assert native.compiled(compiler, tmp_path).stat().st_mtime_ns == built_at
    native.NativeLibrary(first)


def test_without_a_compiler_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'native.cpp:1: error: nothing works today' >&2\n[ \"$1\" = --version ]\n")
    broken.chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path, message in ((str(tmp_path), "nothing works today"), ("", "no C++ compiler")):
        monkeypatch.setenv("PATH", f"{path}:/bin" if path else "")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert native.library.__wrapped__() is None
        assert len(caplog.records) == 1
        assert message in caplog.text
