"""Settings of the services that must know whether a cluster is emulated, and as what."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from starmesh.emulation.emulation import KV_TOKEN_BYTES, Emulation, check_kv_token_bytes
from starmesh.process import ServiceSettings
from starmesh.profiles import load_profile


class EmulationSettings(ServiceSettings):
    """All services of a cluster need the same. Without ``--engine emulated`` the others say nothing."""

    engine: Literal["torch", "emulated"] = Field(
        "torch", description="torch runs a model; emulated lets the time pass that a profile's hardware would take"
    )
    profile: str = Field(
        "", validate_default=True, description="emulated: name or TOML file of the instance's hardware and model"
    )
    speed: float = Field(1.0, gt=0, description="emulated: how many times faster than the hardware time passes")
    kv_tokens: int = Field(0, ge=0, description="emulated: tokens whose KV an instance holds; 0: as the profile says")
    kv_token_bytes: int = Field(
        KV_TOKEN_BYTES, ge=0, description="emulated: bytes that stand for a token's KV; 0: as many as the model's"
    )

    @field_validator("profile")
    @classmethod
    def _profile_when_emulated(cls, name: str, info: ValidationInfo) -> str:
        if info.data.get("engine") == "emulated":
            if not name:
                raise ValueError("needed with --engine emulated: the name or file of a profile, as h100-7b")
            load_profile(name)
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
