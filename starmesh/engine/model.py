"""The torch executor: a ``transformers`` model over the paged KV pool, one ragged forward a step.

Owns the step: lay the batch out, run the stock model with our attention, take logits of the rows that sample and
hidden states of those that are wanted, sample. What may be loaded is ``checkpoint``'s affair, how to attend
``attention``'s, where hidden states are found ``hidden_states``', and what goes into a batch the scheduler's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch

from starmesh.engine import native
from starmesh.engine.attention import RaggedBatch, can_attend, paged_step
from starmesh.engine.batch import Batch, BatchItem, StepResult
from starmesh.engine.checkpoint import Checkpoint, UnsupportedModel, load_checkpoint, verify
from starmesh.engine.hidden_states import HiddenStates, choose_layers
from starmesh.engine.kv_cache import CudaKvCache, HostKvCache, KvCache
from starmesh.engine.layers import accelerate
from starmesh.engine.sampler import BrokenLogits, SamplingRow, sample
from starmesh.model_files import model_revision
from starmesh.types import HiddenLayout, KvLayout

__all__ = ["BrokenLogits", "TorchExecutor", "UnsupportedModel"]


class TorchExecutor:
    """Implements ``batch.Executor``. Make one with ``load``; call ``execute`` from one thread at a time.

    ``memory`` (a ``transfer.BlockMemory``) may be used from any thread.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        memory: HostKvCache | CudaKvCache,
        *,
        hidden_layers: tuple[int, ...],
        library: native.NativeLibrary | None,
        threads: int,
    ) -> None:
        self.layout: KvLayout = memory.layout
        self.total_blocks = memory.total_blocks
        self.memory = memory
        self.hf_model: Any = checkpoint.model
        self.context_tokens = checkpoint.context_tokens
        self.vocabulary_tokens = checkpoint.vocabulary_tokens
        self.eos_token_ids = checkpoint.eos_token_ids
        self._query_heads = checkpoint.shape.query_heads
        self._library = library
        self._threads = threads
        self._device = memory.pool.device
        self.hidden_layout: HiddenLayout | None = None
        self._hidden_states: HiddenStates | None = None
        if hidden_layers:
            width = self.hf_model.get_output_embeddings().weight.shape[1]
            self.hidden_layout = HiddenLayout(self.layout.model_revision, hidden_layers, width)
            self._hidden_states = HiddenStates(self.hf_model, self.hidden_layout, layers=self.layout.layers)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        total_blocks: int | None = None,
        kv_memory_bytes: int | None = None,
        block_tokens: int = 16,
        threads: int = 1,
        use_native: bool = True,
        hidden_layers: Sequence[int] | None = None,
    ) -> Self:
        """Load a model and set up its KV pool: of ``total_blocks``, or as many as fit ``kv_memory_bytes``.

        ``threads`` is torch's thread count for the whole process. ``use_native`` False leaves the compiled CPU kernels
        out. ``hidden_layers`` are those whose output can be asked for: None all that some kind of predictor looks at,
        empty none. Raises UnsupportedModel, FileNotFoundError, or ValueError for settings that cannot be.
        """
        if (total_blocks is None) == (kv_memory_bytes is None):
            raise ValueError("give either total_blocks or kv_memory_bytes")
        target = torch.device(device)
        torch.set_num_threads(threads)
        checkpoint = load_checkpoint(model_dir, device=target, dtype=dtype)
        layout = KvLayout(
            model_revision=model_revision(model_dir),
            dtype=dtype,
            layers=checkpoint.shape.layers,
            kv_heads=checkpoint.shape.kv_heads,
            head_dim=checkpoint.shape.head_dim,
            block_tokens=block_tokens,
        )
        chosen_layers = choose_layers(hidden_layers, layers=layout.layers)
        if kv_memory_bytes is not None:
            total_blocks = kv_memory_bytes // layout.block_bytes
            if total_blocks < 1:
                raise ValueError(
                    f"{kv_memory_bytes} bytes hold no KV block of {layout.block_bytes}: give more KV memory"
                )
        library = native.library() if use_native and target.type == "cpu" else None
        if library is not None:
            accelerate(checkpoint.model, library, threads=threads)
        # One block more than asked for would do for the trial; a pool of its own leaves no trace in the real one.
        trial_blocks = -(-len(checkpoint.trial_token_ids) // block_tokens)
        make = functools.partial(cls, checkpoint, hidden_layers=chosen_layers, library=library, threads=threads)
        trial = make(KvCache.create(layout, trial_blocks, target))
        verify(checkpoint, trial._trial_logits, dtype=dtype)
        trial.close()
        assert total_blocks is not None
        return make(KvCache.create(layout, total_blocks, target))

    @property
    def attends_natively(self) -> bool:
        """Whether the compiled kernels attend (otherwise torch does)."""
        return self._library is not None and can_attend(self._library, self.memory)

    def execute(self, batch: Batch) -> StepResult:
        """Run one step: KV of every item's tokens into the pool, one token for each item that samples.

        ``hidden_states`` is a float32 CPU tensor [items that want one, layers, width]. Raises ValueError for a batch
        that does not fit its blocks or wants hidden states where none are kept, BrokenLogits when the model yields NaN
        or infinity; the KV of the step's own tokens is then undefined, earlier KV untouched.
        """
        sampling = [index for index, item in enumerate(batch.items) if item.samples]
        with torch.inference_mode():
            wanted = [row for row, index in enumerate(sampling) if batch.items[index].wants_hidden_state]
            logits, hidden_states = self._forward(batch.items, sampling, wanted)
            rows = [_sampling_row(batch.items[index]) for index in sampling]
            chosen = sample(logits, rows) if rows else []
            if hidden_states is not None:
                hidden_states = hidden_states.cpu().float()
        token_ids: list[int | None] = [None] * len(batch.items)
        for index, token_id in zip(sampling, chosen, strict=True):
            token_ids[index] = token_id
        return StepResult(token_ids=tuple(token_ids), hidden_states=hidden_states)

    def close(self) -> None:
        """Let go of the model and the pool."""
        if self._hidden_states is not None:
            self._hidden_states.close()
        self.hf_model = None

    def _forward(
        self, items: tuple[BatchItem, ...], sampling: list[int], wanted: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [rows, vocabulary] of the ``sampling`` items' last tokens, and hidden states [wanted, layers, width]
        of those of these rows that are ``wanted``; None if there are none."""
        hidden_states = self._hidden_states
        if wanted and hidden_states is None:
            raise ValueError("a hidden state is wanted, and this executor keeps none")
        ragged = RaggedBatch.of(items, block_tokens=self.layout.block_tokens, total_blocks=self.total_blocks)
        if isinstance(self.memory, CudaKvCache):
            self.memory.step_begins()
        step = paged_step(
            ragged, self.memory, query_heads=self._query_heads, threads=self._threads, library=self._library
        )
        last_rows = torch.from_numpy(ragged.query_starts[1:][sampling] - 1).to(self._device)
        if hidden_states is not None:
            head_rows = torch.tensor(wanted, device=self._device) if wanted else None
            hidden_states.expect(last_rows, head_rows)
        logits = self.hf_model(
            input_ids=torch.from_numpy(ragged.token_ids)[None].to(self._device),
            position_ids=torch.from_numpy(ragged.token_positions)[None].to(self._device),
            use_cache=False,
            logits_to_keep=last_rows,
            paged_step=step,
        ).logits[0]
        if isinstance(self.memory, CudaKvCache):
            self.memory.step_ended()
        return logits, hidden_states.take() if wanted and hidden_states is not None else None

    def _trial_logits(self, token_ids: tuple[int, ...], start: int) -> torch.Tensor:
        item = BatchItem(request_id="trial", token_ids=token_ids, start=start, block_ids=range(self.total_blocks))
        with torch.inference_mode():
            # With its hidden state, where some are kept: a family that does not yield them is refused here.
            return self._forward((item,), [0], [0] if self._hidden_states is not None else [])[0][0]


def _sampling_row(item: BatchItem) -> SamplingRow:
    assert item.history is not None
    if item.sampling is None:
        raise ValueError(f"request {item.request_id} samples without sampling parameters")
    return SamplingRow(request_id=item.request_id, sampling=item.sampling, history=item.history)
