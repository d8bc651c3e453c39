"""What is simulated for docs/results.md. Owns the set-ups; runs nothing.

Loads are requests per second for each decode instance. With the paper's mix an h100-7b instance, whose memory holds
about 74 of its requests on average, is full at 0.245, and one of ``EDGE_TOKENS`` at 0.149.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from starmesh.profiles import Profile, load_profile
from starmesh.sim.config import SimulationConfig, Slo
from starmesh.sim.strategies import STRATEGIES
from starmesh.sim.workload import WorkloadConfig

STRICT = Slo(ttft_s=2.0, tpot_s=0.03)
LOOSE = Slo(ttft_s=10.0, tpot_s=0.05)
"""Both are our choice: an h100-7b step takes 6 ms alone and 28 ms with all of its memory in use."""

WARM_UP_S = 900.0
"""A request of the mix decodes for up to 900 s: only then is the cluster as full as it will be."""

MEASURED_S = 500.0
"""How long measured requests arrive."""

SHADOW_S = 900.0
"""How long others arrive after them: as long as a request decodes, so that none ends in an emptying cluster."""

EDGE_TOKENS = 240_000
"""KV memory at the edge: 19 requests of the mix on average, and at most 7 of its longest."""

VLLM = ("vllm_round_robin", "vllm_least_tokens")
"""Static placement as the paper's baselines have it: nothing is held back for want of memory."""

STATIC = ("round_robin", "least_tokens")
"""Static placement behind our admission, which is kinder to it."""

PREDICTION = ("star_plus_unpredicted", "star_plus", "star_plus_oracle", "star_peak")
"""What differs between them is what is known of remaining lengths, and for ``star_peak`` dispatch."""

BOUND = "perfect_balance"


@dataclass(frozen=True, slots=True)
class Experiment:
    """Runs whose lines are strategies and whose axis is ``axis``; ``place_of`` says where a run stands on it."""

    name: str
    title: str
    axis: str
    place_of: Callable[[SimulationConfig], float | None]
    configs: tuple[SimulationConfig, ...]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is run: seeds of an experiment by its decode instances, and a factor for simulated time."""

    seeds: int = 5
    seeds_large: int = 3
    time: float = 1.0


def rate_per_instance(config: SimulationConfig) -> float | None:
    """The load of an instance."""
    rate = config.workload.rate
    return None if rate is None else round(rate / config.decode_instances, 6)


def experiments(effort: Effort) -> tuple[Experiment, ...]:
    """All of them, the cheap ones first."""
    seeds = tuple(range(effort.seeds))
    few = tuple(range(effort.seeds_large))
    h100 = load_profile("h100-7b")

    def runs(
        names: Sequence[str],
        rates: Sequence[float],
        *,
        decode: int = 3,
        profile: Profile = h100,
        seeds: Sequence[int] = seeds,
        time: float = 1.0,
        shadow_s: float = SHADOW_S,
        **changes: object,
    ) -> Iterator[SimulationConfig]:
        for rate in rates:
            for name in names:
                for seed in seeds:
                    config = reasoning(
                        name, decode=decode, rate=rate, profile=profile, seed=seed, time=effort.time * time
                    )
                    yield dataclasses.replace(config, **changes)  # type: ignore[arg-type]

    pair = ("current_load", "star_plus")
    edge = h100.with_memory(EDGE_TOKENS)
    return (
        Experiment(
            "edge",
            "240,000 tokens of KV memory, from light load to past what it holds",
            "requests per second for each decode instance",
            rate_per_instance,
            tuple(runs((*VLLM, *STATIC, *pair), (0.06, 0.1, 0.12, 0.14, 0.17, 0.2), profile=edge, shadow_s=400.0)),
        ),
        Experiment(
            "prediction",
            "The same, by what is known of remaining lengths",
            "requests per second for each decode instance",
            rate_per_instance,
            tuple(runs(("current_load", *PREDICTION), (0.12, 0.14, 0.17), profile=edge, shadow_s=400.0)),
        ),
        Experiment(
            "impatience",
            "The same past saturation, with a queue that refuses what has waited for 2 s",
            "requests per second for each decode instance",
            rate_per_instance,
            tuple(
                runs(
                    (VLLM[0], *STATIC, *pair, "star_plus_oracle"),
                    (0.17, 0.2, 0.25),
                    profile=edge,
                    shadow_s=400.0,
                    queue_timeout_s=STRICT.ttft_s,
                )
            ),
        ),
        Experiment(
            "load",
            "All of an 80 GB card's memory, from light load to past saturation",
            "requests per second for each decode instance",
            rate_per_instance,
            tuple(runs((VLLM[0], *STATIC, *pair, BOUND), (0.1, 0.25, 0.3), shadow_s=400.0)),
        ),
        Experiment(
            "small_memory",
            "A 24 GB card: 58,736 tokens of KV memory, less than two of the longest requests",
            "requests per second for each decode instance",
            rate_per_instance,
            tuple(
                dataclasses.replace(config, slos=(Slo(10.0, 0.03), Slo(60.0, 0.05)))
                for config in runs((*VLLM, *STATIC, *pair), (0.01,), profile=load_profile("rtx4090-7b"), time=4.0)
            ),
        ),
        Experiment(
            "bandwidth",
            "Bandwidth between instances",
            "GB/s",
            lambda config: config.profile.link.bytes_per_s / 1e9,
            tuple(
                config
                for profile in (edge.with_link(bytes_per_s=0.125e9), edge.with_link(bytes_per_s=1.25e9), edge)
                for config in runs(pair, (0.14,), profile=profile, shadow_s=400.0)
            ),
        ),
        Experiment(
            "recompute",
            "Speed of recomputing what was preempted",
            "times the profile's",
            lambda config: round(h100.cost.prefill_token_s / config.profile.cost.prefill_token_s, 3),
            tuple(
                config
                for profile in (edge.with_recompute_speed(0.25), edge, edge.with_recompute_speed(4.0))
                for config in runs(("least_tokens", *pair), (0.14,), profile=profile, shadow_s=400.0)
            ),
        ),
        Experiment(
            "chat",
            "Chat: short answers, where there is little to balance",
            "requests per second for each decode instance",
            rate_per_instance,
            tuple(
                chat(name, rate, seed, effort.time)
                for rate in (2.0,)
                for name in ("least_tokens", *pair)
                for seed in seeds
            ),
        ),
        Experiment(
            "interval",
            "Seconds between rounds",
            "seconds between rounds",
            lambda config: config.round_interval_s,
            tuple(
                config
                for interval_s in (0.1, 1.0, 10.0, 120.0)
                for config in runs(pair, (0.14,), profile=edge, shadow_s=400.0, round_interval_s=interval_s)
            ),
        ),
        Experiment(
            "size16",
            "16 decode instances",
            "requests per second for each decode instance",
            rate_per_instance,
            tuple(runs((VLLM[0], "least_tokens", *pair), (0.14,), decode=16, profile=edge, shadow_s=400.0, seeds=few)),
        ),
        Experiment(
            "size64",
            "64 decode instances",
            "requests per second for each decode instance",
            rate_per_instance,
            tuple(runs((VLLM[0], "least_tokens", *pair), (0.14,), decode=64, profile=edge, shadow_s=400.0, seeds=few)),
        ),
        Experiment(
            "size256",
            "256 decode instances",
            "requests per second for each decode instance",
            rate_per_instance,
            tuple(
                runs(
                    (VLLM[0], "least_tokens", "star_plus"),
                    (0.14,),
                    decode=256,
                    profile=edge,
                    shadow_s=400.0,
                    seeds=(0,),
                )
            ),
        ),
    )


def reasoning(
    name: str,
    *,
    decode: int,
    rate: float,
    profile: Profile,
    seed: int,
    time: float = 1.0,
    shadow_s: float = SHADOW_S,
) -> SimulationConfig:
    """The paper's mix at ``rate`` for each decode instance."""
    requests = round(rate * decode * (WARM_UP_S + MEASURED_S + shadow_s) * time)
    return SimulationConfig(
        profile=profile,
        strategy=STRATEGIES[name],
        workload=WorkloadConfig(requests=max(requests, 1), rate=rate * decode),
        prefill_instances=max(1, decode // 16),
        decode_instances=decode,
        seed=seed,
        warm_up_s=WARM_UP_S * time,
        measure_until_s=(WARM_UP_S + MEASURED_S) * time,
        slos=(STRICT, LOOSE),
    )


def chat(name: str, rate: float, seed: int, time: float = 1.0) -> SimulationConfig:
    """Chat on three decode instances; a minute is long beside its answers."""
    return SimulationConfig(
        profile=load_profile("h100-7b"),
        strategy=STRATEGIES[name],
        workload=WorkloadConfig(requests=max(1, round(rate * 3 * 240 * time)), rate=rate * 3, lengths="chat"),
        seed=seed,
        warm_up_s=30.0 * time,
        measure_until_s=210.0 * time,
        slos=(STRICT, LOOSE),
    )
