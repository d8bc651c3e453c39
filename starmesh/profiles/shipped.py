"""The derived profiles that ship, from the models' and the accelerators' own numbers.

``python -m starmesh.profiles.shipped`` writes their files anew after a change here or in ``derive``; a test holds the
files to it. ``laptop-cpu`` is not among them: it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from starmesh.profiles.derive import Accelerator, ModelShape, derive, derive_cost
from starmesh.profiles.profile import Profile
from starmesh.profiles.profile_file import SUFFIX, write_profile

QWEN_7B = ModelShape(
    name="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    parameters=7_615_616_512,
    layers=28,
    hidden=3584,
    kv_heads=4,
    head_dim=128,
    vocabulary=152_064,
    context_tokens=131_072,
)
QWEN_32B = ModelShape(
    name="deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    parameters=32_763_876_352,
    layers=64,
    hidden=5120,
    kv_heads=8,
    head_dim=128,
    vocabulary=152_064,
    context_tokens=131_072,
)
LLAMA_70B = ModelShape(
    name="deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    parameters=70_553_706_496,
    layers=80,
    hidden=8192,
    kv_heads=8,
    head_dim=128,
    vocabulary=128_256,
    context_tokens=131_072,
)
_QWEN_72B = ModelShape(
    name="Qwen/Qwen2.5-72B-Instruct",
    parameters=72_706_203_648,
    layers=80,
    hidden=8192,
    kv_heads=8,
    head_dim=128,
    vocabulary=152_064,
    context_tokens=32_768,
)

_NDR = "NDR InfiniBand (400 Gb/s, one adapter for each)"
H100 = Accelerator(
    name="NVIDIA H100 SXM",
    source="NVIDIA H100 Tensor Core GPU: 80 GB (read as 1e9 bytes each), 3.35 TB/s, 989 TFLOPS dense, NVLink 900 GB/s "
    "both ways",
    memory_bytes=80e9,
    memory_bytes_per_s=3.35e12,
    flops=989e12,
    nvlink_bytes_per_s=450e9,
    network=_NDR,
    network_bytes_per_s=50e9,
)
H200 = Accelerator(
    name="NVIDIA H200 SXM",
    source="NVIDIA H200 Tensor Core GPU: 141 GB (read as 1e9 bytes each), 4.8 TB/s, 989 TFLOPS dense, NVLink 900 GB/s "
    "both ways",
    memory_bytes=141e9,
    memory_bytes_per_s=4.8e12,
    flops=989e12,
    nvlink_bytes_per_s=450e9,
    network=_NDR,
    network_bytes_per_s=50e9,
)
RTX_4090 = Accelerator(
    name="NVIDIA GeForce RTX 4090",
    source="NVIDIA Ada GPU Architecture: 24 GB (read as 1e9 bytes each), 1008 GB/s, 165 TFLOPS dense with fp32 sums",
    memory_bytes=24e9,
    memory_bytes_per_s=1.008e12,
    flops=165e12,
    network="25 Gb/s Ethernet",
    network_bytes_per_s=3.125e9,
)


@dataclass(frozen=True, slots=True)
class Published:
    """A decode step's time that somebody has measured with vLLM for one sequence of 128 to 256 tokens in bf16."""

    model: ModelShape
    accelerator: Accelerator
    count: int
    measured_s: float
    source: str

    @property
    def derived_s(self) -> float:
        """What these formulas make of it."""
        return derive_cost(self.model, self.accelerator, count=self.count).step_s(1, 192)

    def __str__(self) -> str:
        model, ours_ms = self.model.name.partition("/")[2], self.derived_s * 1e3
        return (
            f" Compared: a step of one sequence of {model} on {self.count} {self.accelerator.name} comes out at "
            f"{ours_ms:.1f} ms; vLLM's published TPOT is {self.measured_s * 1e3:.1f} ms ({self.source})."
        )


# The 7B models of Qwen2.5 and of the distillation have one shape.
PUBLISHED = (
    Published(QWEN_7B, RTX_4090, 1, 17.1e-3, "github.com/tenstorrent/tt-inference-server issue 125, Qwen2.5-7B"),
    Published(_QWEN_72B, H100, 2, 30.9e-3, "github.com/tenstorrent/tt-inference-server issue 143"),
)

_SHIPPED: Mapping[str, tuple[ModelShape, Accelerator, int]] = MappingProxyType(
    {
        "h100-7b": (QWEN_7B, H100, 1),
        # On one, the weights would leave KV memory for less than one answer of 32K tokens.
        "h100-32b": (QWEN_32B, H100, 2),
        "h100-70b": (LLAMA_70B, H100, 4),
        "h200-7b": (QWEN_7B, H200, 1),
        "h200-32b": (QWEN_32B, H200, 1),
        "h200-70b": (LLAMA_70B, H200, 2),
        "rtx4090-7b": (QWEN_7B, RTX_4090, 1),
    }
)


def derived_profiles() -> tuple[Profile, ...]:
    """Every derived profile that ships, made anew."""
    compared = "".join(map(str, PUBLISHED))
    return tuple(
        derive(name, model, accelerator, count=count, compared=compared)
        for name, (model, accelerator, count) in _SHIPPED.items()
    )


if __name__ == "__main__":
    for profile in derived_profiles():
        write_profile(profile, Path(__file__).parent / f"{profile.name}{SUFFIX}")
