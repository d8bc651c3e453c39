"""Makes the engine of an instance: the model's weights, the KV pool that fits the memory given, the stop strings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from starmesh.clock import WallClock
from starmesh.engine.engine import EngineConfig, EngineCore
from starmesh.instance.settings import EngineSettings
from starmesh.tokenizer import ModelTokenizer, StopMatcher
from starmesh.transfer import BlockMemory
from starmesh.types import HiddenLayout, SequenceSpec


def _as_fast_as_it_goes(blocks: int) -> AbstractAsyncContextManager[None]:
    return nullcontext()


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine that no thread runs yet, the bytes of its KV pool, the longest sequence that it takes and how many at a
    time. A pull of so many blocks is to happen within the context that ``transferring`` makes."""

    core: EngineCore
    memory: BlockMemory
    max_sequence_tokens: int
    max_sequences: int
    transferring: Callable[[int], AbstractAsyncContextManager[None]] = _as_fast_as_it_goes

    @property
    def hidden_layout(self) -> HiddenLayout | None:
        """What its hidden states are made of; None when it keeps none."""
        return self.core.hidden_layout


def load_engine(settings: EngineSettings, model_dir: Path, *, prefix_caching: bool) -> LoadedEngine:
    """Load the weights and set the KV pool up. Takes seconds: not for the event loop.

    Raises UnsupportedModel, and ValueError when the device or a hidden layer is not there or the memory holds no KV
    block.
    """
    # Here and not above: they cost seconds, which a wrong flag should not.
    import torch

    from starmesh.engine.model import TorchExecutor

    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {settings.device}: torch {torch.__version__} finds no CUDA device; use --device cpu, or "
            "install a CUDA build of torch and check that nvidia-smi lists the device"
        )
    executor = TorchExecutor.load(
        model_dir,
        device=settings.device,
        dtype=settings.dtype,
        kv_memory_bytes=settings.kv_memory_mib * 1024 * 1024,
        block_tokens=settings.block_tokens,
        threads=settings.threads,
        hidden_layers=settings.kept_layers,
    )
    tokenizer = ModelTokenizer.load(model_dir)

    def stop_checker(spec: SequenceSpec) -> StopMatcher:
        return StopMatcher(tokenizer, spec.sampling.stop_strings)

    max_sequence_tokens = min(executor.context_tokens, executor.total_blocks * settings.block_tokens)
    config = EngineConfig(
        eos_token_ids=frozenset(executor.eos_token_ids),
        max_sequence_tokens=max_sequence_tokens,
        max_step_tokens=settings.max_step_tokens,
        max_sequences=settings.max_sequences,
        max_waiting_sequences=settings.max_waiting,
        prefix_caching=prefix_caching,
        hidden_every_tokens=settings.hidden_every_tokens,
    )
    core = EngineCore(executor, config, stop_checker=stop_checker, clock=WallClock())
    return LoadedEngine(core, executor.memory, max_sequence_tokens, settings.max_sequences)
