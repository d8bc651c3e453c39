"""What a comparison comes to, in sentences: which strategy is best and by how much, and where it makes no difference.

Owns the words and what counts as a difference. Says nothing that the table does not show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from starmesh.sim.config import Slo
from starmesh.sim.report.intervals import Interval
from starmesh.sim.report.summary import METRICS, Cell, Metric, Summary, goodput_metric, share_metric, slo_text
from starmesh.sim.workload import TRACE

SAME: Final = 0.01
"""A smaller change than this is called none, whatever its interval."""

ENOUGH: Final = 0.95
"""The part of the requests that must meet an SLO for a load to count as carried."""


def conclusions(summary: Summary) -> list[str]:
    """Some sentences, the last of them the answer in short. They set strategies that move running requests against the
    best of those that place a request once, or, where there is only one kind, all against the best. Nothing is called
    better or worse of a single seed, nor where nothing was served."""
    if (nothing := _nothing(summary)) is not None:
        return [nothing]
    baseline, contenders = _sides(summary)
    compared = [_compare(summary, contender, baseline) for contender in contenders]
    said = [_carried(summary, slo) for slo in summary.slos]
    chance = any(len(cell.results) > 1 for cell in summary.cells.values())
    if chance:
        for comparison in compared:
            said.extend(comparison.sentences())
    said.extend(_warnings(summary))
    if not chance:
        of_what = ", of step times and predictions: a trace's requests stay the same" if _any_replayed(summary) else ""
        said.append(f"{'In short: o' if contenders else 'O'}ne seed says nothing of chance; --seeds 5 does{of_what}.")
    elif contenders:
        best = _best(summary, contenders)
        said.append(next(comparison for comparison in compared if comparison.contender == best).verdict())
    return said


def _nothing(summary: Summary) -> str | None:
    """Why there is nothing to conclude, if so."""
    cells = summary.cells.values()
    if not any(cell.measured for cell in cells):
        return (
            "Nothing was measured: no request arrived between the end of the warm-up and that of the measuring; make "
            "--warm-up shorter or --duration longer."
        )
    if not any(cell.finished for cell in cells):
        return (
            "Nothing was served: all measured requests were refused or gave up waiting; try lower --rates, more "
            "--decode instances, more KV memory or shorter requests."
        )
    return None


def is_static(cell: Cell) -> bool:
    """Whether a request stays where it was placed."""
    strategy = cell.results[0].config.strategy
    return strategy.rescheduling == "none" and not strategy.perfect_balance


def is_bound(cell: Cell) -> bool:
    """Whether it is no policy, but what none can pass."""
    return cell.results[0].config.strategy.perfect_balance


def _sides(summary: Summary) -> tuple[str, list[str]]:
    """The baseline, and the policies to be told of against it."""
    first = {name: summary.line(name)[0] for name in summary.strategies}
    policies = [name for name in summary.strategies if not is_bound(first[name])]
    static = [name for name in policies if is_static(first[name])]
    moving = [name for name in policies if name not in static]
    if not policies:
        return summary.strategies[0], []
    baseline = _best(summary, static or policies)
    if static and moving:
        return baseline, moving
    return baseline, [name for name in policies if name != baseline]


def _best(summary: Summary, names: Sequence[str]) -> str:
    """Most goodput under all SLOs and at all loads together; then the lowest P99 TPOT; then the first."""

    def rank(name: str) -> tuple[float, float]:
        cells = summary.line(name)
        goodput = math.fsum(_number(cell.of(goodput_metric(slo)).mean) for cell in cells for slo in summary.slos)
        return -round(goodput, 6), math.fsum(_number(cell.of(METRICS["tpot_p99"]).mean) for cell in cells)

    return min(names, key=rank)


def _carried(summary: Summary, slo: Slo) -> str:
    """Which load each strategy carries within an SLO."""
    known = [load for load in summary.loads if load is not None]
    if not known:
        shares = [
            f"{name} {_share(_number(cell.of(share_metric(slo)).mean))}"
            for name in summary.strategies
            if (cell := summary.cell(name, None)) is not None and cell.measured
        ]
        return f"Within {slo_text(slo)}: {', '.join(shares)} of the requests."
    most: dict[str, float | None] = {}
    for name in summary.strategies:
        carried = None
        for load in known:
            cell = summary.cell(name, load)
            if cell is not None and not cell.measured:
                continue
            if cell is None or _number(cell.of(share_metric(slo)).mean) < ENOUGH:
                break
            carried = load
        most[name] = carried
    bounds = {name for name in most if is_bound(summary.line(name)[0])}
    policies = {name: load for name, load in most.items() if name not in bounds} or most
    within = f"Within {slo_text(slo)} for {_share(ENOUGH)} of the requests"
    heaviest = known[-1]
    if all(load == heaviest for load in policies.values()):
        who = f"{_list(list(policies))} carries" if len(policies) == 1 else "all carry"
        return f"{within}, {who} {heaviest:g}/s, the heaviest load tried."
    parts = [
        f"{_list([name for name, load in policies.items() if load == carried])} "
        + (f"not even {known[0]:g}/s" if carried is None else f"{carried:g}/s")
        for carried in sorted(set(policies.values()), key=lambda load: -(load or 0.0))
    ]
    bound = ""
    for name in bounds:
        if most[name] is None:
            bound = "; nor would perfect balance"
        elif most[name] != heaviest:
            bound = f"; perfect balance carries {most[name]:g}/s"
    return f"{within}, of the loads tried: {', '.join(parts)}{bound}."


@dataclass(frozen=True, slots=True)
class _Comparison:
    """What ``contender`` changes against ``baseline``: (where, what) that is better or worse, and where nothing is."""

    contender: str
    baseline: str
    better: tuple[tuple[str, str], ...]
    worse: tuple[tuple[str, str], ...]
    same: tuple[str, ...]

    def sentences(self) -> list[str]:
        """In full."""
        said = []
        for changes, word in ((self.better, "better"), (self.worse, "worse")):
            if changes:
                parts = "; ".join(f"{where} {what}" for where, what in changes)
                said.append(f"{self.contender} is {word} than {self.baseline}: {parts}.")
        if self.same:
            said.append(f"{self.contender} cannot be told from {self.baseline} {_list(self.same)}.")
        return said

    def verdict(self) -> str:
        """In short."""
        if not self.better:
            reason = "is no better" if self.worse else "cannot be told from it"
            return f"In short: {self.baseline} will do here; {self.contender} {reason}."
        where, what = self.better[-1]
        parts = [f"In short: {self.contender} rather than {self.baseline} gains {where} {what}"]
        if self.same:
            parts.append(f"nothing for sure {_list(self.same)}")
        if self.worse:
            parts.append(f"and loses {_list([where for where, _ in self.worse])}")
        return f"{', '.join(parts)}."


def _compare(summary: Summary, contender: str, baseline: str) -> _Comparison:
    """Load by load, where both were run."""
    better: list[tuple[str, str]] = []
    worse: list[tuple[str, str]] = []
    same: list[str] = []
    metrics = (METRICS["tpot_p99"], *(goodput_metric(slo) for slo in summary.slos))
    for load in summary.loads:
        cell, other = summary.cell(contender, load), summary.cell(baseline, load)
        if cell is None or other is None:
            continue
        changes = [_change(cell, other, metric) for metric in metrics]
        good = [text for direction, text in changes if direction > 0]
        bad = [text for direction, text in changes if direction < 0]
        fewer = cell.difference_to(other, METRICS["preemptions"])
        if abs(fewer.mean) >= 1 and fewer.excludes_zero:
            lost, kept = (each.of(METRICS["preemptions"]).mean for each in (other, cell))
            (good if kept < lost else bad).append(f"preemptions {lost:,.0f} to {kept:,.0f}")
        where = "with the trace as it is" if load is None else f"at {load:g}/s"
        if good:
            better.append((where, ", ".join(good)))
        if bad:
            worse.append((where, ", ".join(bad)))
        if not good and not bad:
            same.append(where)
    return _Comparison(contender, baseline, tuple(better), tuple(worse), tuple(same))


def _change(cell: Cell, other: Cell, metric: Metric) -> tuple[int, str]:
    """1 for better, -1 for worse, 0 for the same; and by how much."""
    ratio = cell.ratio_to(other, metric)
    if math.isnan(ratio.mean):
        if not cell.difference_to(other, metric).excludes_zero:
            return 0, ""
        before, after = (_number(each.of(metric).mean) for each in (other, cell))
        text = f"{metric.label} {before * metric.scale:.{metric.digits}f} to {after * metric.scale:.{metric.digits}f}"
        return (1 if (after > before) == bool(metric.more_is_better) else -1), f"{text} {metric.unit}"
    change = Interval(ratio.mean - 1, ratio.low - 1, ratio.high - 1, ratio.count)
    if abs(change.mean) < SAME or not change.excludes_zero:
        return 0, ""
    certainty = "" if math.isnan(change.low) else f" ({percent(change.low)} to {percent(change.high)})"
    return (1 if (change.mean > 0) == bool(metric.more_is_better) else -1), (
        f"{metric.label} {percent(change.mean)}{certainty}"
    )


def percent(change: float) -> str:
    """A relative change for people; as a factor where a percentage would say little."""
    return f"{change + 1:.2f}x" if change >= 1 else f"{change:+.1%}".replace("%", " %")


def _warnings(summary: Summary) -> list[str]:
    said = []
    cells = [cell for name in summary.strategies for cell in summary.line(name)]
    refused = [cell for cell in cells if cell.of(METRICS["refused"]).mean]
    if refused:
        said.append(f"Requests were refused or gave up waiting: {_names(refused)}; latencies are of the others.")
    cut = [cell for cell in cells if cell.of(METRICS["cut"]).mean]
    if cut:
        said.append(f"Outputs were cut short, where the context or an instance's memory ends: {_names(cut)}.")
    unmeasured = [cell for cell in cells if not cell.measured]
    if unmeasured:
        said.append(f"Nothing was measured, as all requests arrived in the warm-up: {_names(unmeasured)}.")
    versions = {result.code_version for result in summary.results}
    if len(versions) > 1:
        said.append("These results were made by different versions of the code; run them again to compare.")
    if any(result.measured_s <= 0 for result in summary.results):
        said.append("The measured requests arrived all at once, or only one did: there is no goodput per second.")
    if _any_replayed(summary) and any(len(cell.results) > 1 for cell in cells):
        said.append(
            "The requests of a trace are the same for each seed: chance here is that of step times and predictions "
            "only."
        )
    return said


def _any_replayed(summary: Summary) -> bool:
    """Whether each seed serves the same requests."""
    workloads = [cell.results[0].config.workload for cell in summary.cells.values()]
    return any(workload.arrivals == workload.lengths == TRACE for workload in workloads)


def _names(cells: Sequence[Cell]) -> str:
    return ", ".join(f"{cell.strategy}{'' if cell.load is None else f' at {cell.load:g}/s'}" for cell in cells)


def _share(part: float) -> str:
    return f"{part * 100:.3g} %"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _number(value: float) -> float:
    """NaN, of nothing measured, as 0."""
    return 0.0 if math.isnan(value) else value
