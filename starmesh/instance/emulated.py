"""Makes the engine of an emulated instance: no model, no torch."""

from __future__ import annotations

from zlib import crc32

from starmesh.clock import WallClock
from starmesh.emulation.emulation import Emulation
from starmesh.emulation.executor import PacedExecutor
from starmesh.emulation.link import SharedLink
from starmesh.emulation.tokenizer import EmulatedTokenizer
from starmesh.engine.emulated import EOS_TOKEN_ID
from starmesh.engine.engine import EngineConfig, EngineCore
from starmesh.instance.loading import LoadedEngine
from starmesh.instance.settings import EngineSettings
from starmesh.lengths import LENGTH_MODELS
from starmesh.tokenizer import StopMatcher
from starmesh.types import SequenceSpec


def load_emulated(settings: EngineSettings, emulation: Emulation, *, prefix_caching: bool) -> LoadedEngine:
    """The engine that ``emulation`` describes. Blocks, batches and the longest sequence are the profile's, not those of
    the settings."""
    profile = emulation.profile
    executor = PacedExecutor(
        emulation, stream=crc32(settings.instance_id.encode()), hidden_states=settings.kept_layers != ()
    )
    tokenizer = EmulatedTokenizer(context_tokens=profile.max_sequence_tokens, lengths=next(iter(LENGTH_MODELS)))

    def stop_checker(spec: SequenceSpec) -> StopMatcher:
        return StopMatcher(tokenizer, spec.sampling.stop_strings)

    config = EngineConfig(
        eos_token_ids=frozenset({EOS_TOKEN_ID}),
        max_sequence_tokens=profile.max_sequence_tokens,
        max_step_tokens=profile.max_step_tokens,
        max_sequences=profile.max_sequences,
        max_waiting_sequences=settings.max_waiting,
        prefix_caching=prefix_caching,
        hidden_every_tokens=settings.hidden_every_tokens,
    )
    link = SharedLink(emulation.link_bytes_per_s)
    return LoadedEngine(
        # A recount of an accelerator's tens of thousands of blocks takes longer than a step.
        EngineCore(executor, config, stop_checker=stop_checker, clock=WallClock(), checks_when_idle=False),
        executor.memory,
        max_sequence_tokens=profile.max_sequence_tokens,
        max_sequences=profile.max_sequences,
        transferring=lambda blocks: link.transfer(blocks * executor.layout.block_bytes),
    )
