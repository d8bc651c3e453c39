"""Compares a live run with simulations of the same requests. Pure.

A live run is one draw: steps' noise and the processes' timing decide where a request goes, and from there on nothing is
as it would have been. So is a simulation: several, that differ in their steps' noise alone, say how far apart two runs
of the same are. The live value is compared with their mean, and with that of others that place and move requests as it
was done live.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.fidelity.served import MOVED, Run, Served
from benchmarks.fidelity.spans import Span
from starmesh.telemetry import names

_WAY = (names.SPAN_GENERATE, names.SPAN_DISPATCH, names.SPAN_PREFILL, names.SPAN_HANDOFF)

LONG_TOKENS = 64
"""Outputs from here on: the TPOT of a shorter one is for the most part its handoff."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A metric: live, over the simulations that place as live, and over those that place by themselves."""

    live: float
    as_decided: tuple[float, ...]
    simulated: tuple[float, ...]

    def difference(self, values: Sequence[float]) -> float | None:
        """How much more ``values`` say in their mean than there was live, as a part of that; None for a live 0."""
        return statistics.fmean(values) / self.live - 1 if self.live else None


def compare(live: Run, as_decided: Sequence[Run], simulated: Sequence[Run]) -> dict[str, Compared]:
    """All metrics by name; times in milliseconds. Only requests that all of the runs have served count."""
    runs = (live, *as_decided, *simulated)
    common = set.intersection(*({each.request_id for each in run.served} for run in runs))
    found: dict[str, Compared] = {}

    def add(name: str, measure: Callable[[Run], float]) -> None:
        found[name] = Compared(measure(live), tuple(map(measure, as_decided)), tuple(map(measure, simulated)))

    def over(name: str, of: Callable[[Served], float], *, least_tokens: int = 1) -> None:
        def values(run: Run) -> list[float]:
            return [
                1000 * of(each)
                for each in run.served
                if each.request_id in common and each.output_tokens >= least_tokens
            ]

        add(f"{name} mean", lambda run: statistics.fmean(values(run)))
        add(f"{name} P50", lambda run: float(np.percentile(values(run), 50)))
        add(f"{name} P99", lambda run: float(np.percentile(values(run), 99)))

    over("TPOT", lambda each: each.tpot_s, least_tokens=2)
    over(f"TPOT from {LONG_TOKENS} tokens", lambda each: each.tpot_s, least_tokens=LONG_TOKENS)
    over("TTFT", lambda each: each.ttft_s)
    over("end to end", lambda each: each.end_to_end_s)
    over("longest gap", lambda each: each.longest_gap_s, least_tokens=2)
    add("preemptions", lambda run: run.preemptions)
    add("migrations per request", lambda run: sum(run.moves_by_reason().values()) / len(run.served))
    for reason in sorted({reason for run in runs for reason in run.moves_by_reason()}):
        add(f"migrations ({reason})", lambda run, reason=reason: run.moves_by_reason().get(reason, 0))  # type: ignore[misc]
    add("migrations not moved", lambda run: sum(run.other_ends().values()))
    if any(run.moves for run in runs):
        for name, of in (("migration", "duration_s"), ("standing still", "stood_still_s")):
            add(
                f"{name} mean",
                lambda run, of=of: (
                    1000  # type: ignore[misc]
                    * statistics.fmean([getattr(move, of) for move in run.moves if move.outcome == MOVED] or [0.0])
                ),
            )
    return found


def differences(live: Run, simulated: Run, of: Callable[[Served], float]) -> dict[str, float]:
    """Request by request: live less simulated, in milliseconds: quantiles over the requests."""
    expected = {each.request_id: of(each) for each in simulated.served}
    gaps = [1000 * (of(each) - expected[each.request_id]) for each in live.served if each.request_id in expected]
    quantiles = np.percentile(gaps, [1, 10, 50, 90, 99])
    named = zip(("p1", "p10", "p50", "p90", "p99"), quantiles, strict=True)
    return {"mean": round(statistics.fmean(gaps), 2), **{name: round(float(value), 2) for name, value in named}}


def stages(live: Run, spans: Iterable[Span]) -> dict[str, dict[str, float]]:
    """What a request's first token waited for, live, and its handoff: milliseconds, mean, median and 99th percentile.
    Only of requests that were placed once."""
    by_request: dict[str, dict[str, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for span in spans:
        by_request[span.request_id][span.name].append(span)
    found: dict[str, list[float]] = defaultdict(list)
    for each in live.served:
        own = by_request[each.request_id]
        if not all(len(own[name]) == 1 for name in _WAY):
            continue
        router, dispatch, prefill, handoff = (own[name][0] for name in _WAY)
        found["to the router"].append(router.began_s - each.asked_s)
        found["dispatch"].append(dispatch.ended_s - router.began_s)
        found["claim, and to the prefill instance"].append(prefill.began_s - dispatch.ended_s)
        found["prefill"].append(prefill.duration_s)
        found["back to the client"].append(each.first_token_s - prefill.ended_s)
        found["to the decode instance"].append(handoff.began_s - prefill.ended_s)
        found["handoff"].append(handoff.duration_s)
    return {name: _milliseconds(values) for name, values in found.items()}


def _milliseconds(values_s: Sequence[float]) -> dict[str, float]:
    median, p99 = np.percentile(values_s, [50, 99])
    figures = {"mean": statistics.fmean(values_s), "p50": float(median), "p99": float(p99)}
    return {name: round(1000 * value, 2) for name, value in figures.items()}
