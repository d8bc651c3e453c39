"""What stands for KV in an emulated instance's blocks: for each token a mark of which it is and where it stands.

Owns the marks: a step writes those of the tokens that it computes, and looks whether others of the same sequences are
what they should be. So a block that a handoff or a migration has left behind, mixed up or cut short fails the step that
meets it, as it would spoil the answer of a model.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from starmesh.engine.batch import Batch, BatchItem
from starmesh.transfer.host_memory import HostMemory

_STRIDE = 40_503  # odd, and near 2**16 / golden ratio: multiples of it come by all parts of a sequence soon


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
        self._steps = 0

    def compute(self, batch: Batch) -> None:
        """Check two tokens of each decoding sequence, the last one computed and another at each step, and mark those
        that this step computes. Raises WrongMark."""
        self._steps += 1
        decoding = [item for item in batch.items if len(item.token_ids) == 1 and item.history is not None]
        self._check(decoding, [item.start - 1 for item in decoding])
        self._check(decoding, [self._steps * _STRIDE % max(1, item.start) for item in decoding])
        for item in batch.items:
            if len(item.token_ids) > 1 or item.history is None:
                positions = np.arange(item.start, item.start + len(item.token_ids))
                self._write(np.asarray(item.block_ids)[positions // self._block_tokens], positions, item.token_ids)
        if decoding:
            blocks = [item.block_ids[item.start // self._block_tokens] for item in decoding]
            self._write(blocks, np.array([item.start for item in decoding]), [item.token_ids[0] for item in decoding])

    def _write(self, blocks: npt.ArrayLike, positions: npt.NDArray[np.int64], token_ids: npt.ArrayLike) -> None:
        slots = positions % self._block_tokens
        at = np.asarray(blocks)
        self._token_ids[at, slots] = np.asarray(token_ids)
        self._positions[at, slots] = positions + 1  # 0 is a block that nobody has written

    def _check(self, items: list[BatchItem], positions: list[int]) -> None:
        asked = [(item, at) for item, at in zip(items, positions, strict=True) if item.start > 0]
        if not asked:
            return
        block_tokens = self._block_tokens
        blocks = np.array([item.block_ids[at // block_tokens] for item, at in asked])
        at = np.array([at for _, at in asked])
        expected = np.array([item.history[at] if item.history is not None else 0 for item, at in asked])
        wrong = (self._token_ids[blocks, at % block_tokens] != expected) | (
            self._positions[blocks, at % block_tokens] != at + 1
        )
        if wrong.any():
            item, position = asked[int(np.argmax(wrong))]
            raise WrongMark(
                f"block {item.block_ids[position // block_tokens]} does not hold token {position} of {item.request_id}"
            )
