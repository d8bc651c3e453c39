"""A profile's fields, and profiles that differ from one in memory, network or speed.

Owns what a profile is made of; its file format is ``profile_file``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from starmesh.policy.cost import CostModel
from starmesh.types import KvLayout

DTYPES = ("float32", "bfloat16", "float16")

_CHOSEN = "chosen for this run"


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
    name ("cost.step_base_s", "total_blocks"), and for the whole under "profile", where it comes from: a datasheet and a
    formula, or a measurement. Raises ProfileError for numbers that cannot be.
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
        layout = self.layout
        if min(layout.layers, layout.kv_heads, layout.head_dim, layout.block_tokens) < 1 or layout.dtype not in DTYPES:
            raise ProfileError(f"{self.name}: a layout has counts of at least 1 and a dtype of {DTYPES}, not {layout}")
        counts = (self.total_blocks, self.max_sequences, self.max_step_tokens, self.max_sequence_tokens)
        if min(counts) < 1 or not 0.0 <= self.step_noise < 1.0:
            raise ProfileError(f"{self.name}: counts are at least 1 and step_noise within 0 to 1, not {self}")
        if self.max_sequences > self.max_step_tokens:
            raise ProfileError(
                f"{self.name}: each of {self.max_sequences} sequences needs a token in a step; max_step_tokens is "
                f"{self.max_step_tokens}"
            )

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV an instance holds."""
        return self.total_blocks * self.layout.block_tokens

    def with_memory(self, kv_tokens: int) -> Profile:
        """This one with the blocks that ``kv_tokens`` tokens take; it takes no longer sequences than before."""
        blocks = -(-kv_tokens // self.layout.block_tokens)
        limit = min(self.max_sequence_tokens, blocks * self.layout.block_tokens)
        return replace(
            self,
            total_blocks=blocks,
            max_sequence_tokens=limit,
            provenance={**self.provenance, **dict.fromkeys(("total_blocks", "max_sequence_tokens"), _CHOSEN)},
        )

    def with_link(self, *, bytes_per_s: float) -> Profile:
        """This one with another bandwidth, in its link and in what the policy believes a transfer costs."""
        return replace(
            self,
            link=replace(self.link, bytes_per_s=bytes_per_s),
            cost=replace(self.cost, transfer_bytes_per_s=bytes_per_s),
            provenance={
                **self.provenance,
                **dict.fromkeys(("link.bytes_per_s", "cost.transfer_bytes_per_s"), _CHOSEN),
            },
        )

    def with_recompute_speed(self, factor: float) -> Profile:
        """This one ``factor`` times as fast at computing prompts, hence at recomputing what was preempted."""
        if factor <= 0:
            raise ProfileError(f"{self.name}: a speed factor is above 0, not {factor}")
        chosen = f"{factor} times as fast as: "
        names = ("cost.prefill_token_s", "cost.prefill_pair_s")
        return replace(
            self,
            cost=replace(
                self.cost,
                prefill_token_s=self.cost.prefill_token_s / factor,
                prefill_pair_s=self.cost.prefill_pair_s / factor,
            ),
            provenance={**self.provenance, **{name: chosen + self.provenance.get(name, "?") for name in names}},
        )
