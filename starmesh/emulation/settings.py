"""Settings of the services that must know whether a cluster is emulated, and as what."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from starmesh.emulation.emulation import KV_TOKEN_BYTES, Emulation, check_kv_token_bytes
from starmesh.policy.cost import LAPTOP_CPU, CostModel
from starmesh.process import ServiceSettings
from starmesh.profiles import load_profile


class EmulationSettings(ServiceSettings):
    """All services of a cluster need the same. Without ``--engine emulated`` only the profile says something."""

    engine: Literal["torch", "emulated"] = Field(
        "torch", description="torch runs a model; emulated lets the time pass that a profile's hardware would take"
    )
    profile: str = Field(
        "",
        validate_default=True,
        description="name or TOML file of the instances' hardware and model: what steps and transfers cost (empty: as "
        "on laptop-cpu), and what is emulated",
    )
    speed: float = Field(1.0, gt=0, description="emulated: how many times faster than the hardware time passes")
    kv_tokens: int = Field(0, ge=0, description="emulated: tokens whose KV an instance holds; 0: as the profile says")
    kv_token_bytes: int = Field(
        KV_TOKEN_BYTES, ge=0, description="emulated: bytes that stand for a token's KV; 0: as many as the model's"
    )

    @field_validator("profile")
    @classmethod
    def _known_profile(cls, name: str, info: ValidationInfo) -> str:
        if name:
            load_profile(name)
        elif info.data.get("engine") == "emulated":
            raise ValueError("needed with --engine emulated: the name or file of a profile, as h100-7b")
        return name

    @field_validator("kv_token_bytes")
    @classmethod
    def _whole_slots(cls, kv_token_bytes: int) -> int:
        check_kv_token_bytes(kv_token_bytes)
        return kv_token_bytes

    @cached_property
    def emulation(self) -> Emulation | None:
        """What it emulates; None when a model runs."""
        if self.engine != "emulated":
            return None
        profile = load_profile(self.profile)
        if self.kv_tokens:
            profile = profile.with_memory(self.kv_tokens)
        return Emulation(profile=profile, speed=self.speed, kv_token_bytes=self.kv_token_bytes)

    @cached_property
    def cost(self) -> CostModel:
        """What steps and transfers take, for whoever decides by it."""
        if self.emulation is not None:
            return self.emulation.cost
        return load_profile(self.profile).cost if self.profile else LAPTOP_CPU
