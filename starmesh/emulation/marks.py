"""What stands for KV in an emulated instance's blocks: for each token a mark of which it is and where it stands.

Owns the marks: a step writes those of the tokens that it computes, and of a sequence that has just come, by handoff,
migration or from the prefix cache, it looks whether all are there. So a block that was left behind, mixed up or cut
short on its way fails the step that meets it, as it would spoil the answer of a model.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import numpy.typing as npt

from starmesh.engine.batch import Batch, BatchItem
from starmesh.transfer.host_memory import HostMemory


class WrongMark(Exception):
    """A block does not hold the KV of its sequence's tokens."""


class KvMarks:
    """Marks in ``memory``, whose tokens have at least 8 bytes each."""

    def __init__(self, memory: HostMemory) -> None:
        layout = memory.layout
        words = memory.blocks.view("<u4").reshape(len(memory.blocks), layout.block_tokens, layout.token_bytes // 4)
        self._token_ids: npt.NDArray[np.uint32] = words[:, :, 0]
        self._positions: npt.NDArray[np.uint32] = words[:, :, 1]
        self._block_tokens = layout.block_tokens

    def compute(self, batch: Batch, *, known_ids: Set[str]) -> None:
        """Mark the tokens that a step computes, after a look at all before them of sequences that sample and are not in
        ``known_ids``. Raises WrongMark."""
        decoding = []
        for item in batch.items:
            if item.start and item.history is not None and item.request_id not in known_ids:
                self._check(item)
            if len(item.token_ids) == 1:
                decoding.append(item)
            else:
                positions = np.arange(item.start, item.start + len(item.token_ids))
                self._write(np.asarray(item.block_ids)[positions // self._block_tokens], positions, item.token_ids)
        if decoding:
            blocks = [item.block_ids[item.start // self._block_tokens] for item in decoding]
            self._write(blocks, np.array([item.start for item in decoding]), [item.token_ids[0] for item in decoding])

    def _write(self, blocks: npt.ArrayLike, positions: npt.NDArray[np.int64], token_ids: npt.ArrayLike) -> None:
        slots = positions % self._block_tokens
        at = np.asarray(blocks)
        self._token_ids[at, slots] = np.asarray(token_ids)
        self._positions[at, slots] = positions + 1  # 0 is what nobody has written

    def _check(self, item: BatchItem) -> None:
        assert item.history is not None
        positions = np.arange(item.start)
        blocks = np.asarray(item.block_ids)[positions // self._block_tokens]
        slots = positions % self._block_tokens
        wrong = self._token_ids[blocks, slots] != np.asarray(item.history[: item.start])
        wrong |= self._positions[blocks, slots] != positions + 1
        if wrong.any():
            first = int(np.argmax(wrong))
            raise WrongMark(f"block {blocks[first]} does not hold token {first} of {item.request_id}")
