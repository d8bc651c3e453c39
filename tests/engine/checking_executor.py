"""An executor without a model that still depends on every block being the right one.

The "KV" of a position is a digest of the token there and of the KV of the position before it, read back through the
block table; the next token is a function of the KV of all positions. So a wrong block table, a wrong start, a block
that two sequences write, or one that was reused too early changes the tokens, just as it would with a model.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from starmesh.engine.batch import Batch, BatchItem, StepResult
from starmesh.types import HiddenLayout, KvLayout

VOCABULARY = 23
EOS = 0
HIDDEN_LAYOUT = HiddenLayout("checking", (1, 2), 3)


def kv(previous: int, token_id: int) -> int:
    return zlib.crc32(token_id.to_bytes(4, "little"), previous)


def next_token(context: Sequence[int]) -> int:
    digest = 0
    for value in context:
        digest = zlib.crc32(value.to_bytes(4, "little"), digest)
    return digest % VOCABULARY


def reference_tokens(prompt_token_ids: Sequence[int], outputs: int) -> list[int]:
    """The first ``outputs`` tokens that follow, whatever ends the sequence."""
    context: list[int] = []
    for token_id in prompt_token_ids:
        context.append(kv(context[-1] if context else 0, token_id))
    generated: list[int] = []
    for _ in range(outputs):
        generated.append(next_token(context))
        context.append(kv(context[-1], generated[-1]))
    return generated


def hidden_state(history: Sequence[int]) -> npt.NDArray[np.float32]:
    """What the executor makes of a sequence's tokens: small whole numbers, which float16 holds exactly."""
    last = [len(history), history[0], history[-1]]
    return np.array([last, [-value for value in last]], dtype=np.float32)


class CheckingExecutor:
    """Runs batches on ``total_blocks`` blocks of ``block_tokens`` slots, and checks that they make sense."""

    def __init__(self, total_blocks: int, block_tokens: int = 4, max_step_tokens: int = 1 << 30) -> None:
        self.layout = KvLayout("checking", "float32", 1, 1, 1, block_tokens)
        self.hidden_layout: HiddenLayout | None = HIDDEN_LAYOUT
        self.total_blocks = total_blocks
        self.max_step_tokens = max_step_tokens
        self.blocks: list[list[int | None]] = [[None] * block_tokens for _ in range(total_blocks)]
        self.failures: list[Exception] = []  # raised by the next steps
        self.steps = 0
        self.computed_tokens = 0
        self.largest_step_tokens = 0

    def execute(self, batch: Batch) -> StepResult:
        self.steps += 1
        if self.failures:
            self._scribble(batch)
            raise self.failures.pop(0)
        step_tokens = sum(len(item.token_ids) for item in batch.items)
        assert 0 < step_tokens <= self.max_step_tokens
        self.computed_tokens += step_tokens
        self.largest_step_tokens = max(self.largest_step_tokens, step_tokens)
        # All items write, then all read: as a model does, layer by layer.
        for item in batch.items:
            assert item.token_ids
            for position, token_id in enumerate(item.token_ids, start=item.start):
                previous = self._read(item, position - 1) if position else 0
                self._write(item, position, kv(previous, token_id))
        return StepResult(
            token_ids=tuple(self._sample(item) for item in batch.items),
            hidden_states=self._hidden_states(batch),
        )

    def copy_block(self, block_id: int, source: CheckingExecutor, source_block_id: int) -> None:
        self.blocks[block_id] = list(source.blocks[source_block_id])

    def _hidden_states(self, batch: Batch) -> npt.NDArray[np.float32] | None:
        wanting = [item for item in batch.items if item.wants_hidden_state]
        assert not wanting or self.hidden_layout is not None
        states = [hidden_state(item.history) for item in wanting if item.history is not None]
        assert len(states) == len(wanting)
        return np.stack(states) if states else None

    def _sample(self, item: BatchItem) -> int | None:
        end = item.start + len(item.token_ids)
        if item.history is None:
            return None
        assert len(item.history) == end
        assert list(item.history[item.start :]) == list(item.token_ids)
        assert item.sampling is not None
        return next_token([self._read(item, position) for position in range(end)])

    def _slot(self, item: BatchItem, position: int) -> tuple[list[int | None], int]:
        index, offset = divmod(position, self.layout.block_tokens)
        return self.blocks[item.block_ids[index]], offset

    def _read(self, item: BatchItem, position: int) -> int:
        block, offset = self._slot(item, position)
        value = block[offset]
        assert value is not None, f"{item.request_id} reads position {position}, which nobody wrote"
        return value

    def _write(self, item: BatchItem, position: int, value: int) -> None:
        block, offset = self._slot(item, position)
        block[offset] = value

    def _scribble(self, batch: Batch) -> None:
        """A step that fails half way has written anything to the places that it was to write."""
        for item in batch.items:
            for position in range(item.start, item.start + len(item.token_ids)):
                self._write(item, position, 0xDEAD)
