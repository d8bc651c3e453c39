"""What ``starmesh simulate`` is asked for, as the configurations to run.

Owns how options are read and what stands in for those not given. Owns no running (``simulate_run``).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypedDict

from starmesh.cli.run import CliError
from starmesh.profiles import Profile, load_profile
from starmesh.sim.config import Fault, FaultKind, SimulationConfig, Slo, Strategy
from starmesh.sim.predictors import PREDICTORS
from starmesh.sim.saturation import Saturation, estimate
from starmesh.sim.strategies import STRATEGIES
from starmesh.sim.workload import SimulatedRequest, WorkloadConfig, draw_requests
from starmesh.types import Role

TRACE: Final = "trace"
LOADS: Final = (0.5, 0.75, 0.95)
"""Parts of the estimated saturation that are tried when no rate is given."""

PART: Final = 1 / 3
"""The part of the time during which requests arrive in which the cluster fills, unmeasured, and the part, at most, in
which it goes on after those that are measured: for as long as the longest request takes, as far as full batches let
foresee, so that what was measured ends under load too."""

LONGEST: Final = 3.0
"""How many times the longest request's duration requests arrive, if nothing is said: then the cluster is filled, with
requests of all ages, after ``PART`` of it, and the last measured request may be the longest. A shorter ``--duration``
is measured in a cluster that is emptier."""

_SAMPLE: Final = 4096
_MOST_TRACE: Final = 10_000_000
_UNITS: Final = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """The options, as they were given; None and empty for those that were not."""

    compare: str
    profile: str
    decode: int
    prefill: int | None = None
    trace: Path | None = None
    lengths: str | None = None
    arrivals: str | None = None
    variation: float = 1.0
    max_output_tokens: int | None = None
    output_scale: float = 1.0
    rates: str = ""
    requests: int | None = None
    duration: str = ""
    warm_up: str = ""
    seeds: int | None = None
    round_interval: str = "1s"
    kv_tokens: int | None = None
    kv_memory_gb: float | None = None
    link_gb_per_s: float | None = None
    recompute_speed: float = 1.0
    slos: Sequence[str] = ()
    faults: Sequence[str] = ()
    predictor: str = ""
    queue_length: int | None = None
    queue_timeout: str = ""


@dataclass(frozen=True, slots=True)
class SimulatePlan:
    """The configurations, by strategy, rate and seed, and what was estimated on the way."""

    configs: tuple[SimulationConfig, ...]
    saturation_rate: float


def make_plan(options: SimulateOptions) -> SimulatePlan:
    """Raises CliError for what cannot be; also ProfileError and WorkloadError, whose messages say what to do."""
    if options.requests is not None and options.duration:
        raise CliError("--requests and --duration both say how many; leave one out")
    round_interval_s = seconds(options.round_interval, "--round-interval")
    if round_interval_s <= 0:
        raise CliError(f"--round-interval: {options.round_interval!r} is no time between rounds; write 100ms or more")
    profile = _profile(options)
    strategies = _strategies(options)
    seeds = options.seeds
    workload = _workload(options)
    sample = list(itertools.islice(draw_requests(workload, seed=0), _SAMPLE))
    if not sample:
        raise CliError(f"{options.trace} holds no request that generated anything; name another with --trace")
    saturation = estimate(profile, sample)
    asked = _rates(options)
    sizes = {rate: _sized(options, dataclasses.replace(workload, rate=rate), saturation) for rate in asked or ()}
    # Loads that are parts of the saturation ask for as many prefill instances as that does.
    heaviest = max((size.rate for size in sizes.values()), default=math.inf)
    prefill = options.prefill or saturation.prefill_instances(heaviest, decode_instances=options.decode)
    saturated = saturation.rate(prefill_instances=prefill, decode_instances=options.decode)
    rates = asked or tuple(float(f"{part * saturated:.2g}") for part in LOADS)
    for rate in rates:
        if rate not in sizes:
            sizes[rate] = _sized(options, dataclasses.replace(workload, rate=rate), saturation)
    if seeds is None:
        # A trace as it is differs between seeds by noise and predictions only.
        seeds = 1 if rates == (None,) else 3
    configs = []
    faults = tuple(map(read_fault, options.faults))
    queue = _queue(options)
    for strategy, rate, seed in itertools.product(strategies, rates, range(seeds)):
        size = sizes[rate]
        configs.append(
            SimulationConfig(
                profile=profile,
                strategy=strategy,
                workload=size.workload,
                prefill_instances=prefill,
                decode_instances=options.decode,
                seed=seed,
                warm_up_s=size.warm_up_s,
                measure_until_s=size.until_s,
                round_interval_s=round_interval_s,
                slos=tuple(map(read_slo, options.slos)) or (Slo(2.0, 0.05), Slo(5.0, 0.1)),
                faults=faults,
                **queue,
            )
        )
    _check(configs[0])
    if any(fault.role is Role.DECODE for fault in faults) and any(each.perfect_balance for each in strategies):
        bound = next(each.name for each in strategies if each.perfect_balance)
        raise CliError(f"--fault: {bound} has no decode instances that could fail; leave it out of --compare")
    return SimulatePlan(tuple(configs), saturated)


def seconds(text: str, option: str) -> float:
    """A duration: "90", "90s", "1.5m", "50ms", "2h". Raises CliError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        raise CliError(f"{option}: {text!r} is no duration; write 90s, 1.5m, 2h or 50ms")
    return float(match[1]) * _UNITS[match[2]]


def read_slo(text: str) -> Slo:
    """ "ttft=2s,tpot=50ms". Raises CliError."""
    given = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if set(given) != {"ttft", "tpot"}:
        raise CliError(f"--slo: {text!r} does not name both; write ttft=2s,tpot=50ms")
    return Slo(ttft_s=seconds(given["ttft"], "--slo"), tpot_s=seconds(given["tpot"], "--slo"))


def read_fault(text: str) -> Fault:
    """ "120s:die:decode-3". Raises CliError."""
    at, _, rest = text.partition(":")
    kind, _, instance_id = rest.partition(":")
    kinds = [member.value for member in FaultKind]
    if kind not in kinds or not instance_id:
        raise CliError(f"--fault: {text!r} is none; write WHEN:{'|'.join(kinds)}:INSTANCE, such as 120s:die:decode-3")
    role = Role.PREFILL if instance_id.startswith(Role.PREFILL.value) else Role.DECODE
    return Fault(seconds(at, "--fault"), FaultKind(kind), instance_id, role)


def _check(config: SimulationConfig) -> None:
    """Refuse faults of instances that there are not."""
    counts = {Role.PREFILL: config.prefill_instances, Role.DECODE: config.decode_instances}
    known = {config.instance_id(role, number) for role, count in counts.items() for number in range(count)}
    for fault in sorted(config.faults, key=lambda fault: fault.at_s):
        if fault.kind is FaultKind.JOIN:
            known.add(fault.instance_id)
        elif fault.instance_id not in known:
            first, last = (config.instance_id(fault.role, number) for number in (0, counts[fault.role] - 1))
            raise CliError(f"--fault: there is no {fault.instance_id} then; the cluster begins with {first} to {last}")


def _profile(options: SimulateOptions) -> Profile:
    profile = load_profile(options.profile)
    if options.kv_tokens is not None and options.kv_memory_gb is not None:
        raise CliError("--kv-tokens and --kv-memory-gb say the same; leave one out")
    kv_tokens = options.kv_tokens
    if options.kv_memory_gb is not None:
        kv_tokens = int(options.kv_memory_gb * 1e9 / profile.layout.token_bytes)
    if kv_tokens is not None:
        profile = profile.with_memory(kv_tokens)
    if options.link_gb_per_s is not None:
        profile = profile.with_link(bytes_per_s=options.link_gb_per_s * 1e9)
    if options.recompute_speed != 1.0:
        profile = profile.with_recompute_speed(options.recompute_speed)
    return profile


class _Queue(TypedDict, total=False):
    queue_length: int
    queue_timeout_s: float


def _queue(options: SimulateOptions) -> _Queue:
    """What was said of the router's queue; the rest is as it is live."""
    queue = _Queue()
    if options.queue_length is not None:
        queue["queue_length"] = options.queue_length
    if options.queue_timeout:
        queue["queue_timeout_s"] = seconds(options.queue_timeout, "--queue-timeout")
    return queue


def _strategies(options: SimulateOptions) -> list[Strategy]:
    names = [name.strip() for name in options.compare.split(",") if name.strip()]
    if options.predictor and options.predictor not in PREDICTORS:
        raise CliError(f"--predictor: {options.predictor!r} is none of {', '.join(PREDICTORS)}")
    for name in names:
        if name not in STRATEGIES:
            raise CliError(f"--compare: {name!r} is none of {', '.join(STRATEGIES)}")
    if not names:
        raise CliError(f"--compare names at least one of {', '.join(STRATEGIES)}")
    chosen = [STRATEGIES[name] for name in dict.fromkeys(names)]
    if options.predictor:
        # One that asks no predictor would not know what to do with it.
        chosen = [
            strategy if strategy.predictor == "none" else dataclasses.replace(strategy, predictor=options.predictor)
            for strategy in chosen
        ]
    return chosen


def _workload(options: SimulateOptions) -> WorkloadConfig:
    """All but how many requests and how fast."""
    traced = options.trace is not None
    for option, given in (("--arrivals", options.arrivals), ("--lengths", options.lengths)):
        if given == TRACE and not traced:
            raise CliError(f"{option} {TRACE} needs the file that they are read from; name it with --trace")
    arrivals = options.arrivals or (TRACE if traced else "gamma" if options.variation != 1.0 else "poisson")
    workload = WorkloadConfig(
        requests=_MOST_TRACE,
        rate=None if arrivals == TRACE else 1.0,
        arrivals=arrivals,
        variation=options.variation,
        lengths=options.lengths or (TRACE if traced else "reasoning"),
        output_scale=options.output_scale,
        trace_path=str(options.trace) if options.trace is not None else None,
    )
    if options.max_output_tokens is None:
        return workload
    return dataclasses.replace(workload, max_output_tokens=options.max_output_tokens)


def _rates(options: SimulateOptions) -> tuple[float | None, ...] | None:
    """The rates asked for, None among them for a trace's own; None for those of ``LOADS``."""
    if options.rates:
        try:
            rates = tuple(dict.fromkeys(float(rate) for rate in options.rates.split(",")))
        except ValueError:
            rates = ()
        if not rates or min(rates) <= 0 or not math.isfinite(max(rates)):
            raise CliError(f"--rates: {options.rates!r} are no numbers above 0; write 1,2,4")
        return rates
    if options.trace is not None and options.arrivals in (None, TRACE):
        return (None,)
    return None


@dataclass(frozen=True, slots=True)
class _Size:
    """The workload with as many requests as it is to have, from when on they are measured and until when, and how many
    come in a second; of a trace as it is, in its busiest minute."""

    workload: WorkloadConfig
    warm_up_s: float
    until_s: float | None
    rate: float


def _sized(options: SimulateOptions, workload: WorkloadConfig, saturation: Saturation) -> _Size:
    duration_s = seconds(options.duration, "--duration") if options.duration else None
    warm_up_s = seconds(options.warm_up, "--warm-up") if options.warm_up else None
    if workload.rate is None or (workload.arrivals == TRACE and options.requests is None and duration_s is None):
        # A trace is measured whole, unless told otherwise.
        count = options.requests or _MOST_TRACE
        drawn = itertools.islice(draw_requests(workload, seed=0), count)
        minutes = Counter(int(request.arrives_s // 60) for request in _before(drawn, duration_s))
        sized = dataclasses.replace(workload, requests=max(1, minutes.total()))
        busiest = max(minutes.values(), default=1) / 60
        return _Size(sized, warm_up_s or 0.0, None, workload.rate or busiest)
    if options.requests is not None:
        requests, duration_s = options.requests, options.requests / workload.rate
    else:
        if duration_s is None:
            duration_s = LONGEST * saturation.longest_s
        requests = max(1, math.ceil(duration_s * workload.rate))
    sized = dataclasses.replace(workload, requests=requests)
    if warm_up_s is not None:
        return _Size(sized, warm_up_s, None, workload.rate)
    until_s = duration_s - min(saturation.longest_s, PART * duration_s)
    return _Size(sized, PART * duration_s, until_s, workload.rate)


def _before(requests: Iterator[SimulatedRequest], end_s: float | None) -> Iterator[SimulatedRequest]:
    if end_s is None:
        return requests
    return itertools.takewhile(lambda request: request.arrives_s <= end_s, requests)
