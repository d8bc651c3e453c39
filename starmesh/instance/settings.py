"""Settings of an engine instance."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from starmesh.emulation.settings import EmulationSettings
from starmesh.engine.engine import HIDDEN_EVERY_TOKENS
from starmesh.types import TransferBackend

NO_LAYERS = "none"


class EngineSettings(EmulationSettings):
    """Settings of a prefill or decode instance. An emulated one takes model, device, memory, blocks and batches from
    its profile."""

    model: str = Field("", description="model directory, hub id or name; empty: the default model")
    device: str = Field("cpu", description="cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="element type of weights and KV")
    kv_memory_mib: int = Field(512, gt=0, description="memory for KV blocks")
    block_tokens: int = Field(16, ge=1, le=256, description="tokens of a KV block")
    threads: int = Field(
        1, ge=1, description="CPU threads of a forward; more than the idle cores makes all of them spin and wait"
    )
    max_sequences: int = Field(64, ge=1, description="sequences in a batch")
    max_step_tokens: int = Field(512, ge=1, description="tokens computed in a step: bounds how long a step takes")
    max_waiting: int = Field(256, ge=1, description="sequences that may wait; more are refused")
    transfer: str = Field(
        "",
        description="transfer backends, best first, of nixl and stream; one that is missing is left out; empty: both, "
        "and with TLS stream only: NIXL does not encrypt",
    )
    transfer_timeout_s: float = Field(30.0, gt=0, description="time that a pull may take")
    stall_timeout_s: float = Field(60.0, gt=0, description="time without a finished step until the engine must hang")
    kv_lease_s: float = Field(30.0, gt=0, description="how long KV is kept for whoever is to pull it")
    hidden_layers: str = Field(
        "",
        description="layers whose output the predictor gets, by their numbers from 1, separated by commas; empty: all "
        "that some kind of predictor looks at; none: none. Prefill and decode instances need the same",
    )
    hidden_every_tokens: int = Field(
        HIDDEN_EVERY_TOKENS, ge=1, description="tokens of a sequence between two of its hidden states"
    )

    @field_validator("transfer")
    @classmethod
    def _known_backends(cls, value: str) -> str:
        known = [backend.value for backend in TransferBackend]
        unknown = [name for name in value.split(",") if name not in known]
        if value and unknown:
            raise ValueError(f"{', '.join(unknown)} unknown; use some of {', '.join(known)}, separated by commas")
        return value

    @field_validator("hidden_layers")
    @classmethod
    def _layer_numbers(cls, value: str) -> str:
        wrong = [number for number in value.split(",") if not number.isascii() or not number.isdigit()]
        if value not in {"", NO_LAYERS} and wrong:
            raise ValueError(f"{value!r} is not understood; give numbers of layers as in 15,30, or {NO_LAYERS}")
        return value

    @property
    def kept_layers(self) -> tuple[int, ...] | None:
        """The layers that ``hidden_layers`` names, in any order; None for the default."""
        if self.hidden_layers == NO_LAYERS:
            return ()
        return tuple(map(int, self.hidden_layers.split(","))) if self.hidden_layers else None

    @property
    def transfer_backends(self) -> list[TransferBackend]:
        """The backends that ``transfer`` names, or that go without saying."""
        if self.transfer:
            return [TransferBackend(name) for name in self.transfer.split(",")]
        # NIXL moves KV, from which prompts can be had back, over connections of its own in the clear.
        return [TransferBackend.STREAM] if self.tls_cert is not None else [TransferBackend.NIXL, TransferBackend.STREAM]
