"""What an emulated cluster emulates, in the units of its own clock and its own bytes.

Owns the conversion: time passes ``speed`` times faster than in the profile, and a token's KV takes fewer bytes. A
transfer takes the profile's time all the same, so the rate in our small bytes is that much lower.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from starmesh.policy.cost import CostModel
from starmesh.profiles import Profile
from starmesh.types import KvLayout

KV_TOKEN_BYTES = 64
"""Bytes of a token's KV unless told otherwise: 60 MB for the million tokens that an accelerator of 80 GB holds beside a
7B model, where the model's own would be 56 KiB a token and 50 GB. Our choice."""

_SLOT_BYTES = 4  # a key and a value of two bytes each, in one layer and one head


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """Instances of ``profile`` whose time passes ``speed`` times faster, with ``kv_token_bytes`` of KV per token (a
    multiple of 4; 0: as many as the model's). Raises ValueError."""

    profile: Profile
    speed: float = 1.0
    kv_token_bytes: int = KV_TOKEN_BYTES

    def __post_init__(self) -> None:
        if self.speed <= 0:
            raise ValueError(f"time passes at a speed above 0, not {self.speed}")
        if self.kv_token_bytes % _SLOT_BYTES or not (
            self.kv_token_bytes == 0 or self.kv_token_bytes >= 2 * _SLOT_BYTES
        ):
            raise ValueError(f"a token's KV has 0, 8, 12, 16 ... bytes, not {self.kv_token_bytes}")

    @property
    def layout(self) -> KvLayout:
        """How its KV blocks are laid out. The revision keeps them apart from those of the model itself."""
        layout = self.profile.layout
        layout = replace(layout, model_revision=f"emulated-{layout.model_revision}")
        if not self.kv_token_bytes:
            return layout
        return replace(layout, dtype="bfloat16", layers=1, kv_heads=1, head_dim=self.kv_token_bytes // _SLOT_BYTES)

    @property
    def cost(self) -> CostModel:
        """What its steps and transfers take: seconds of the wall clock, and bytes of ``layout``."""
        cost, speed = self.profile.cost, self.speed
        return CostModel(
            step_base_s=cost.step_base_s / speed,
            step_sequence_s=cost.step_sequence_s / speed,
            step_token_s=cost.step_token_s / speed,
            transfer_setup_s=cost.transfer_setup_s / speed,
            transfer_bytes_per_s=self._own_bytes_per_s(cost.transfer_bytes_per_s),
            prefill_token_s=cost.prefill_token_s / speed,
            prefill_pair_s=cost.prefill_pair_s / speed,
        )

    @property
    def link_bytes_per_s(self) -> float:
        """Bytes of ``layout`` that an instance's link moves in a second of the wall clock."""
        return self._own_bytes_per_s(self.profile.link.bytes_per_s)

    def _own_bytes_per_s(self, bytes_per_s: float) -> float:
        return bytes_per_s * self.speed * self.layout.token_bytes / self.profile.layout.token_bytes


def check_kv_token_bytes(kv_token_bytes: int) -> None:
    """Raise ValueError for bytes that cannot stand for a token's KV."""
    if kv_token_bytes % _SLOT_BYTES or kv_token_bytes == _SLOT_BYTES:
        raise ValueError(f"a token's KV has 0, 8, 12, 16 ... bytes, not {kv_token_bytes}")
