"""Attention over the paged KV pool, for the attention modules of ``transformers``' own model classes.

Owns one step's metadata and the two ways to attend: native (``native.cpp``, on a CPU) and torch (any device). Both
first store the step's keys and values in the pool, then attend from each query to its sequence's tokens up to its own
position. The executor passes the step as an extra keyword argument of the forward; every layer's attention module
hands it on to ``paged_attention``, registered with ``transformers`` as ``ATTENTION_NAME``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import AttentionInterface

from starmesh.engine import native
from starmesh.engine.batch import BatchItem
from starmesh.engine.kv_cache import KvCache

ATTENTION_NAME = "starmesh_paged"

Int64Array = npt.NDArray[np.int64]


class PagedStep(Protocol):
    """What a step lends to the attention modules of its forward."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        softcap: float,
        window: int,
    ) -> torch.Tensor:
        """Store [1, kv_heads, tokens, head_dim] keys and values; attend with [1, query_heads, tokens, head_dim].

        ``softcap`` 0: none; ``window`` 0: all tokens, otherwise the last ``window`` including the query's own.
        Returns [1, tokens, query_heads, head_dim].
        """
        ...


class UnsupportedAttention(Exception):
    """An attention module asks for something that paged attention does not do."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    paged_step: PagedStep | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that ``transformers`` calls; raises UnsupportedAttention for sinks or masks."""
    if paged_step is None:
        raise UnsupportedAttention("the model does not hand keyword arguments on to its attention")
    if attention_mask is not None or s_aux is not None:
        raise UnsupportedAttention("its attention needs a mask or sinks of its own")
    output = paged_step.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap or 0.0,
        window=sliding_window or 0,
    )
    return output, None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """A step's items as arrays: the tokens of all items stand one after another.

    Item i owns tokens ``query_starts[i]`` to ``query_starts[i + 1] - 1``, the first of them at position
    ``positions[i]``; its block table is ``tables[table_starts[i]:table_starts[i + 1]]``. ``slots`` says where each
    token's KV goes: block * block_tokens + offset.
    """

    query_starts: Int64Array
    positions: Int64Array
    table_starts: Int64Array
    tables: Int64Array
    token_ids: Int64Array
    token_positions: Int64Array
    slots: Int64Array

    @staticmethod
    def of(items: Sequence[BatchItem], *, block_tokens: int, total_blocks: int) -> RaggedBatch:
        """Lay items out. Raises ValueError for an item without tokens, or whose blocks do not cover its tokens."""
        counts = np.array([len(item.token_ids) for item in items], dtype=np.int64)
        positions = np.array([item.start for item in items], dtype=np.int64)
        table_sizes = np.array([len(item.block_ids) for item in items], dtype=np.int64)
        short = (counts < 1) | (positions < 0) | ((positions + counts) > table_sizes * block_tokens)
        if short.any():
            item = items[int(short.argmax())]
            raise ValueError(
                f"request {item.request_id}: {len(item.token_ids)} tokens from position {item.start} on do not fit "
                f"{len(item.block_ids)} blocks of {block_tokens}"
            )
        query_starts = np.concatenate(([0], counts.cumsum()))
        table_starts = np.concatenate(([0], table_sizes.cumsum()))
        tables = np.concatenate([np.asarray(item.block_ids, dtype=np.int64) for item in items])
        if tables.min() < 0 or tables.max() >= total_blocks:
            raise ValueError(f"a block table names a block outside the pool of {total_blocks}")
        token_positions = np.arange(query_starts[-1]) + np.repeat(positions - query_starts[:-1], counts)
        blocks = tables[np.repeat(table_starts[:-1], counts) + token_positions // block_tokens]
        return RaggedBatch(
            query_starts=query_starts,
            positions=positions,
            table_starts=table_starts,
            tables=tables,
            token_ids=np.concatenate([np.asarray(item.token_ids, dtype=np.int64) for item in items]),
            token_positions=token_positions,
            slots=blocks * block_tokens + token_positions % block_tokens,
        )


def paged_step(
    batch: RaggedBatch, cache: KvCache, *, query_heads: int, threads: int, library: native.NativeLibrary | None
) -> PagedStep:
    """The step for ``batch``: native where ``library`` (None: do without) can take this pool, torch elsewhere."""
    if library is not None and can_attend(library, cache):
        return NativeStep(batch, cache, library, query_heads=query_heads, threads=threads)
    return TorchStep(batch, cache)


def can_attend(library: native.NativeLibrary, cache: KvCache) -> bool:
    """Whether the library has attention for this pool's device, dtype and head size."""
    layout = cache.layout
    return (
        cache.pool.device.type == "cpu"
        and layout.dtype in library.attention
        and layout.head_dim % library.lanes == 0
        and layout.head_dim <= library.max_head_dim
    )


class NativeStep:
    """Attention by ``native.cpp``: one call a layer stores and attends."""

    def __init__(
        self, batch: RaggedBatch, cache: KvCache, library: native.NativeLibrary, *, query_heads: int, threads: int
    ) -> None:
        layout = cache.layout
        self._batch = batch  # keeps the arrays alive that the C struct points into
        self._shape = (1, len(batch.token_ids), query_heads, layout.head_dim)
        self._function = library.attention[layout.dtype]
        self._step = native.Step(
            pool=cache.pool.data_ptr(),
            query_starts=batch.query_starts.ctypes.data,
            positions=batch.positions.ctypes.data,
            table_starts=batch.table_starts.ctypes.data,
            tables=batch.tables.ctypes.data,
            slots=batch.slots.ctypes.data,
            items=len(batch.positions),
            layers=layout.layers,
            kv_heads=layout.kv_heads,
            query_heads=query_heads,
            block_tokens=layout.block_tokens,
            head_dim=layout.head_dim,
            threads=threads,
        )
        self._address = ctypes.addressof(self._step)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        softcap: float,
        window: int,
    ) -> torch.Tensor:
        query, key, value = _adjacent(query), _adjacent(key), _adjacent(value)
        output = torch.empty(self._shape, dtype=query.dtype)
        self._function(
            self._address,
            layer,
            query.data_ptr(),
            query.stride(2),
            query.stride(1),
            key.data_ptr(),
            key.stride(2),
            key.stride(1),
            value.data_ptr(),
            value.stride(2),
            value.stride(1),
            output.data_ptr(),
            scale,
            softcap,
            window,
        )
        return output


def _adjacent(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only if the elements of a head do not lie side by side."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


class TorchStep:
    """Attention by gather and torch: items of one token together as one padded batch, longer ones one by one."""

    def __init__(self, batch: RaggedBatch, cache: KvCache) -> None:
        device, block_tokens = cache.pool.device, cache.layout.block_tokens
        self._pool = cache.pool
        slots = torch.from_numpy(batch.slots).to(device)
        self._blocks, self._offsets = slots // block_tokens, slots % block_tokens
        lengths = np.diff(batch.query_starts)
        single = np.flatnonzero(lengths == 1)
        groups = ([single] if len(single) else []) + [np.array([item]) for item in np.flatnonzero(lengths > 1)]
        self._groups = [_Group.of(batch, items, block_tokens=block_tokens, device=device) for items in groups]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        softcap: float,
        window: int,
    ) -> torch.Tensor:
        pool = self._pool[:, layer]
        pool[self._blocks, 0, :, self._offsets] = key[0].transpose(0, 1)
        pool[self._blocks, 1, :, self._offsets] = value[0].transpose(0, 1)
        output = torch.empty_like(query[0].transpose(0, 1), memory_format=torch.contiguous_format)
        for group in self._groups:
            group.attend(pool, query[0], output, scale=scale, softcap=softcap, window=window)
        return output[None]


class _Group:
    """Items with equally many queries, their block tables padded to one length."""

    def __init__(self, rows: torch.Tensor, tables: torch.Tensor, positions: torch.Tensor, block_tokens: int) -> None:
        self._rows = rows  # [items, queries]: places in the ragged batch
        self._tables = tables  # [items, blocks]
        self._positions = positions  # [items, queries]
        self._keys = torch.arange(tables.shape[1] * block_tokens, device=rows.device)
        # What a former owner left behind a sequence's last token may be NaN, which no mask and no zero weight undoes.
        unwritten = self._keys > positions[:, -1:]
        self._unwritten = unwritten.view(tables.shape[0], tables.shape[1], 1, 1, block_tokens, 1)
        self._masks: dict[int, torch.Tensor] = {}  # by window: the same for all layers of a kind

    @staticmethod
    def of(batch: RaggedBatch, items: Int64Array, *, block_tokens: int, device: torch.device) -> _Group:
        starts = batch.query_starts[items]
        queries = int(batch.query_starts[items[0] + 1] - starts[0])
        positions = batch.positions[items][:, None] + np.arange(queries)
        blocks = int(positions.max()) // block_tokens + 1
        # Padding repeats a table's last block; positions mask it.
        columns = np.minimum(np.arange(blocks), positions[:, -1:] // block_tokens)
        tables = batch.tables[batch.table_starts[items][:, None] + columns]
        arrays = (starts[:, None] + np.arange(queries), tables, positions)
        rows, tables_on_device, positions_on_device = (torch.from_numpy(array).to(device) for array in arrays)
        return _Group(rows, tables_on_device, positions_on_device, block_tokens)

    def attend(
        self,
        pool: torch.Tensor,
        query: torch.Tensor,
        output: torch.Tensor,
        *,
        scale: float,
        softcap: float,
        window: int,
    ) -> None:
        """Fill this group's rows of ``output`` [tokens, heads, head_dim] from ``pool`` [blocks, 2, ...] of a layer."""
        queries = query[:, self._rows].transpose(0, 1)  # [items, heads, queries, head_dim]
        gathered = pool[self._tables]  # [items, blocks, 2, kv_heads, block_tokens, head_dim]
        gathered.masked_fill_(self._unwritten, 0.0)
        keys, values = gathered.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [items, kv_heads, tokens, head_dim] each
        mask = self._mask(window)
        if softcap == 0.0:
            mixed = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            )
        else:
            group = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
            scores = torch.matmul(queries, keys.transpose(2, 3)) * scale
            scores = torch.tanh(scores / softcap) * softcap
            weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
            mixed = torch.matmul(weights.to(values.dtype), values)
        output[self._rows] = mixed.transpose(1, 2)

    def _mask(self, window: int) -> torch.Tensor:
        """[items, 1, queries, tokens]: whether a query sees a token."""
        if window not in self._masks:
            age = self._positions[:, None, :, None] - self._keys
            self._masks[window] = (age >= 0) & (age < window) if window else age >= 0
        return self._masks[window]
