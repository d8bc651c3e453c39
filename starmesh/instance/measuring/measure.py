"""Measures this machine with a model, and makes the profile of it. Loads torch.

Owns what a measured profile consists of and says of itself.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

from starmesh.clock import WallClock
from starmesh.engine.engine import EngineConfig, EngineCore, StopChecker
from starmesh.engine.model import TorchExecutor, UnsupportedModel
from starmesh.instance.measuring import MeasuringFailed
from starmesh.instance.measuring.pulls import MeasuredPulls, measure_pulls
from starmesh.instance.measuring.steps import MeasuredSteps, measure_steps
from starmesh.policy.cost import CostModel
from starmesh.profiles import Link, Profile
from starmesh.profiles.fit import StepFit, fit_steps
from starmesh.profiles.profile_file import number_names
from starmesh.types import SequenceSpec

OnProgress = Callable[[str, float], None]
_SIGNIFICANT_DIGITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureSettings:
    """What is measured; fields as in ``EngineSettings``. ``budget_s`` is for the steps, without loading."""

    model_dir: Path
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    kv_memory_mib: int = 512
    block_tokens: int = 16
    max_sequences: int = 64
    max_step_tokens: int = 512
    budget_s: float = 75.0


@dataclass(frozen=True, slots=True)
class MeasuredProfile:
    """The profile, and how it came about."""

    profile: Profile
    steps: MeasuredSteps
    fit: StepFit
    pulls: MeasuredPulls


def measure_profile(settings: MeasureSettings, *, name: str, command: str, on_progress: OnProgress) -> MeasuredProfile:
    """Load the model, time pulls and steps, and fit. ``on_progress`` gets what is done, and the part of it, 0 to 1.

    Raises MeasuringFailed, or ValueError for settings that cannot be.
    """
    on_progress("loading the model", 0.0)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise MeasuringFailed(f"torch {torch.__version__} finds no CUDA device; use --device cpu")
    try:
        executor = TorchExecutor.load(
            settings.model_dir,
            device=settings.device,
            dtype=settings.dtype,
            kv_memory_bytes=settings.kv_memory_mib << 20,
            block_tokens=settings.block_tokens,
            threads=settings.threads,
            hidden_layers=(),
        )
    except UnsupportedModel as error:
        raise MeasuringFailed(str(error)) from error
    on_progress("transfers between two processes", 0.0)
    pulls = asyncio.run(measure_pulls(executor.layout))
    if settings.device == "cpu":
        # Pages that nobody has written are one page of zeros, which any cache holds.
        zeros = bytes(executor.layout.block_bytes)
        for block_id in range(executor.total_blocks):
            executor.memory.write_block(block_id, 0, zeros)
    clock = WallClock()
    core = EngineCore(
        executor,
        EngineConfig(
            eos_token_ids=frozenset(executor.eos_token_ids),
            max_sequence_tokens=executor.context_tokens,
            max_step_tokens=settings.max_step_tokens,
            max_sequences=settings.max_sequences,
        ),
        stop_checker=_no_stop_strings,
        clock=clock,
    )
    try:
        steps = measure_steps(
            core,
            clock,
            max_sequences=settings.max_sequences,
            max_step_tokens=settings.max_step_tokens,
            vocabulary_tokens=executor.vocabulary_tokens,
            budget_s=settings.budget_s,
            on_progress=lambda part: on_progress("steps of the engine", part),
        )
    finally:
        executor.close()
    fit = fit_steps(steps.times)
    # Where reading KV is lost in the noise it is not free: then as fast as a transfer reads it.
    token_s = fit.step_token_s or executor.layout.token_bytes / pulls.bytes_per_s
    profile = Profile(
        name=name,
        cost=CostModel(
            step_base_s=_rounded(fit.step_base_s),
            step_sequence_s=_rounded(fit.step_sequence_s),
            step_token_s=_rounded(token_s),
            transfer_setup_s=_rounded(pulls.setup_s),
            transfer_bytes_per_s=_rounded(pulls.bytes_per_s),
            prefill_token_s=_rounded(fit.prefill_token_s),
            prefill_pair_s=_rounded(fit.prefill_pair_s),
        ),
        layout=executor.layout,
        total_blocks=executor.total_blocks,
        link=Link(_rounded(pulls.bytes_per_s), _rounded(pulls.message_s)),
        max_sequences=settings.max_sequences,
        max_step_tokens=settings.max_step_tokens,
        max_sequence_tokens=min(executor.context_tokens, executor.total_blocks * settings.block_tokens),
        step_noise=_rounded(min(steps.noise, 0.9)),
        provenance=_provenance(settings, command, steps, fit, pulls),
    )
    return MeasuredProfile(profile, steps, fit, pulls)


def _provenance(
    settings: MeasureSettings, command: str, steps: MeasuredSteps, fit: StepFit, pulls: MeasuredPulls
) -> dict[str, str]:
    fitted = f"fitted to {len(steps.times)} kinds of steps: median error {fit.median_error:.1%}"
    pulled = f"measured: {pulls.backend.value} between two processes of this machine, host memory to host memory"
    texts = dict.fromkeys(number_names(), "setting of the measurement, or the model's config.json")
    texts |= {key: fitted for key in texts if key.startswith("cost.")}
    texts |= dict.fromkeys(("cost.transfer_setup_s", "cost.transfer_bytes_per_s", "link.bytes_per_s"), pulled)
    if fit.step_token_s == 0.0:
        texts |= {"cost.step_token_s": "not seen above the noise: a token's KV at the speed of a transfer"}
    texts["cost.transfer_setup_s"] += "; a pull and its release, without reserving and claiming"
    texts["link.latency_s"] = "measured: half of a call over the loopback"
    texts["step_noise"] = "measured: median over the kinds of steps of the relative deviation of one kind"
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    whole = (
        f"Measured on {_processor(settings.device)}, threads: {settings.threads}{load}, {date.today()}: "
        f"{settings.model_dir.name} in {settings.dtype}, rounds: {steps.rounds}. Command: {command}"
    )
    return {"profile": whole, **texts}


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _rounded(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")


def _no_stop_strings(spec: SequenceSpec) -> StopChecker:
    raise AssertionError(f"{spec.request_id} has stop strings")
