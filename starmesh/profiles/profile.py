"""A profile's fields. Owns what a profile is made of; its file format is ``profile_file``'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from starmesh.policy.cost import CostModel
from starmesh.types import KvLayout


class ProfileError(ValueError):
    """A profile that is unknown or cannot be; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Link:
    """An instance's network: ``bytes_per_s`` each way, shared by its transfers, and ``latency_s`` of one message."""

    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.latency_s < 0:
            raise ProfileError(f"a link has a bandwidth above 0 and a latency of at least 0, not {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One kind of instance. ``total_blocks`` of ``layout`` are its KV memory; the limits are as in ``Scheduler``.

    ``step_noise`` is the relative standard deviation of a step's duration. ``provenance`` says for each number by its
    name where it comes from: a datasheet and a formula, or a measurement.
    """

    name: str
    cost: CostModel
    layout: KvLayout
    total_blocks: int
    link: Link
    max_sequences: int
    max_step_tokens: int
    max_sequence_tokens: int
    step_noise: float = 0.0
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = (self.total_blocks, self.max_sequences, self.max_step_tokens, self.max_sequence_tokens)
        if min(counts) < 1 or not 0.0 <= self.step_noise < 1.0:
            raise ProfileError(f"{self.name}: counts are at least 1 and step_noise within 0 to 1, not {self}")

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV an instance holds."""
        return self.total_blocks * self.layout.block_tokens
