"""What one step computes and what comes of it: the seam between the scheduler's world and the executor's.

Pure data. An executor (``model.TorchExecutor``, later an emulated one and others) turns a ``Batch`` into a
``StepResult``; it knows nothing of scheduling, and the scheduler nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starmesh.types import HiddenLayout, KvLayout, SamplingParams


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One sequence's share of a step.

    Computes KV for ``token_ids``, which stand at positions ``start`` to ``start + len(token_ids) - 1``, into the
    blocks of ``block_ids`` (the whole block table, in order). ``history`` is set on items that sample: all tokens of
    the sequence, for penalties, of which the first ``prompt_tokens`` are the prompt; its length is the position of the
    token to be sampled. An item that samples may say ``wants_hidden_state``: that of its last token, which the step
    computes anyway.
    """

    request_id: str
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    sampling: SamplingParams | None = None
    history: Sequence[int] | None = None
    wants_hidden_state: bool = False
    prompt_tokens: int = 0

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

    ``hidden_states`` is [items that want one, layers, width] in order, float32, as the executor's own array type: the
    hidden state at the last token of each, laid out as ``Executor.hidden_layout``; None when nobody wants one.
    """

    token_ids: tuple[int | None, ...]
    hidden_states: Any = None


class Executor(Protocol):
    """Runs forwards over a KV pool of ``total_blocks`` blocks laid out as ``layout``. Called from one thread.

    ``hidden_layout`` describes the hidden states that it can return; None for one that keeps none: then no item may
    want one."""

    layout: KvLayout
    hidden_layout: HiddenLayout | None
    total_blocks: int

    def execute(self, batch: Batch) -> StepResult:
        """Run one step."""
        ...
