"""The torch executor: a ``transformers`` model over the paged KV pool, one ragged forward a step.

Owns the step: lay the batch out, run the stock model with our attention, take logits and hidden states of the rows
that sample, sample. What may be loaded is ``checkpoint``'s affair, how to attend ``attention``'s, and what goes into a
batch the scheduler's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch

from starmesh.engine import native
from starmesh.engine.attention import RaggedBatch, can_attend, paged_step
from starmesh.engine.batch import Batch, BatchItem, StepResult
from starmesh.engine.checkpoint import Checkpoint, UnsupportedModel, load_checkpoint, verify
from starmesh.engine.kv_cache import CudaKvCache, HostKvCache, KvCache
from starmesh.engine.layers import accelerate
from starmesh.engine.sampler import BrokenLogits, SamplingRow, sample
from starmesh.model_files import model_revision
from starmesh.types import KvLayout

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
        self._head_input = torch.empty(0)
        self._hook = self.hf_model.get_output_embeddings().register_forward_pre_hook(self._keep_head_input)

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
    ) -> Self:
        """Load a model and set up its KV pool: of ``total_blocks``, or as many as fit ``kv_memory_bytes``.

        ``threads`` is torch's thread count for the whole process. ``use_native`` False leaves the compiled CPU kernels
        out. Raises UnsupportedModel, FileNotFoundError, or ValueError for settings that cannot be.
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
        trial = cls(checkpoint, KvCache.create(layout, trial_blocks, target), library=library, threads=threads)
        verify(checkpoint, trial._trial_logits, dtype=dtype)
        trial.close()
        assert total_blocks is not None
        return cls(checkpoint, KvCache.create(layout, total_blocks, target), library=library, threads=threads)

    @property
    def attends_natively(self) -> bool:
        """Whether the compiled kernels attend (otherwise torch does)."""
        return self._library is not None and can_attend(self._library, self.memory)

    def execute(self, batch: Batch) -> StepResult:
        """Run one step: KV of every item's tokens into the pool, one token for each item that samples.

        ``hidden_states`` is a float32 CPU tensor [sampling items, hidden], after the final norm. Raises ValueError for
        a batch that does not fit its blocks, BrokenLogits when the model yields NaN or infinity; the KV of the step's
        own tokens is then undefined, earlier KV untouched.
        """
        sampling = [index for index, item in enumerate(batch.items) if item.samples]
        with torch.inference_mode():
            logits, hidden_states = self._forward(batch.items, sampling)
            rows = [_sampling_row(batch.items[index]) for index in sampling]
            chosen = sample(logits, rows) if rows else []
            hidden_states = hidden_states.float().cpu()
        token_ids: list[int | None] = [None] * len(batch.items)
        for index, token_id in zip(sampling, chosen, strict=True):
            token_ids[index] = token_id
        return StepResult(token_ids=tuple(token_ids), hidden_states=hidden_states)

    def close(self) -> None:
        """Let go of the model and the pool."""
        self._hook.remove()
        self.hf_model = None

    def _forward(self, items: tuple[BatchItem, ...], sampling: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [rows, vocabulary] and final hidden states [rows, hidden] of the ``sampling`` items' last tokens."""
        ragged = RaggedBatch.of(items, block_tokens=self.layout.block_tokens, total_blocks=self.total_blocks)
        if isinstance(self.memory, CudaKvCache):
            self.memory.step_begins()
        step = paged_step(
            ragged, self.memory, query_heads=self._query_heads, threads=self._threads, library=self._library
        )
        logits = self.hf_model(
            input_ids=torch.from_numpy(ragged.token_ids)[None].to(self._device),
            position_ids=torch.from_numpy(ragged.token_positions)[None].to(self._device),
            use_cache=False,
            logits_to_keep=torch.from_numpy(ragged.query_starts[1:][sampling] - 1).to(self._device),
            paged_step=step,
        ).logits[0]
        if isinstance(self.memory, CudaKvCache):
            self.memory.step_ended()
        hidden_states, self._head_input = self._head_input, torch.empty(0)
        return logits, hidden_states[0]

    def _keep_head_input(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """What the output layer multiplies is the final hidden state, in every family, already at the rows wanted."""
        self._head_input = inputs[0]

    def _trial_logits(self, token_ids: tuple[int, ...], start: int) -> torch.Tensor:
        item = BatchItem(request_id="trial", token_ids=token_ids, start=start, block_ids=range(self.total_blocks))
        with torch.inference_mode():
            return self._forward((item,), [0])[0][0]


def _sampling_row(item: BatchItem) -> SamplingRow:
    assert item.history is not None
    if item.sampling is None:
        raise ValueError(f"request {item.request_id} samples without sampling parameters")
    return SamplingRow(request_id=item.request_id, sampling=item.sampling, history=item.history)
