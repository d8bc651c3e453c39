"""What one step computes and what comes of it: the seam between the scheduler's world and the executor's.

Pure data. An executor (``model.TorchExecutor``, later an emulated one and others) turns a ``Batch`` into a
``StepResult``; it knows nothing of scheduling, and the scheduler nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starmesh.types import KvLayout, SamplingParams


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One sequence's share of a step.

    Computes KV for ``token_ids``, which stand at positions ``start`` to ``start + len(token_ids) - 1``, into the
    blocks of ``block_ids`` (the whole block table, in order). ``history`` is set on items that sample: all tokens of
    the sequence, prompt included, for penalties; its length is the position of the token to be sampled.
    """

    request_id: str
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    sampling: SamplingParams | None = None
    history: Sequence[int] | None = None

    @property
    def samples(self) -> bool:
        """Whether the step ends with a new token for this item."""
        return self.history is not None


@dataclass(frozen=True, slots=True)
class Batch:
    """The items of one step, in the order of the results."""

    items: tuple[BatchItem, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """``token_ids`` has one entry for each item: the sampled token, or None for an item that does not sample.

    ``hidden_states`` is [sampling items, hidden] in order: the model's final hidden state at each sampling item's last
    token, as the executor's own array type; None from executors without a model.
    """

    token_ids: tuple[int | None, ...]
    hidden_states: Any = None


class Executor(Protocol):
    """Runs forwards over a KV pool of ``total_blocks`` blocks laid out as ``layout``. Called from one thread."""

    layout: KvLayout
    total_blocks: int

    def execute(self, batch: Batch) -> StepResult:
        """Run one step."""
        ...
