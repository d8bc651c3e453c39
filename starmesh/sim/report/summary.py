"""Results side by side: a line for each strategy, a cell for each of its loads, the seeds of a cell together.

Owns the metrics and how runs are grouped. Owns no words and no drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from starmesh.sim.config import SimulationConfig, Slo
from starmesh.sim.report.intervals import Interval, interval, ratio_interval
from starmesh.sim.result import SimulationResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A number of a result. ``scale`` turns it into the ``unit`` that people read, with ``digits`` after the point;
    ``more_is_better`` is None for what is neither good nor bad by itself."""

    name: str
    label: str
    value: Callable[[SimulationResult], float]
    unit: str = ""
    scale: float = 1.0
    digits: int = 0
    more_is_better: bool | None = False


def _failed_moves(result: SimulationResult) -> float:
    """The part of all migrations that did not move their sequence."""
    return result.migrations.failed / max(1, result.migrations.failed + result.migrations.moved)


def _output_tokens_per_s(result: SimulationResult) -> float:
    """For each second in which measured requests arrived, as goodput is; a run ends with a tail in which none do."""
    return result.requests.output_tokens / result.measured_s if result.measured_s > 0 else float("nan")


METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric(name="tpot_p50", label="P50 TPOT", unit="ms", scale=1e3, digits=1, value=lambda result: result.tpot.p50),
        Metric(name="tpot_p99", label="P99 TPOT", unit="ms", scale=1e3, digits=1, value=lambda result: result.tpot.p99),
        Metric(
            name="tpot_mean", label="mean TPOT", unit="ms", scale=1e3, digits=1, value=lambda result: result.tpot.mean
        ),
        Metric(
            name="itl_p99",
            label="P99 ITL, whole run",
            unit="ms",
            scale=1e3,
            digits=1,
            value=lambda result: result.itl.p99,
        ),
        Metric(
            name="longest_gap_p99",
            label="P99 longest gap",
            unit="s",
            digits=2,
            value=lambda result: result.longest_gap.p99,
        ),
        Metric(name="ttft_p50", label="P50 TTFT", unit="s", digits=2, value=lambda result: result.ttft.p50),
        Metric(name="ttft_p99", label="P99 TTFT", unit="s", digits=2, value=lambda result: result.ttft.p99),
        Metric(
            name="preemptions",
            label="preemptions of measured requests",
            value=lambda result: float(result.requests.preemptions),
        ),
        Metric(
            name="migrations_per_request",
            label="moves per measured request",
            digits=2,
            value=lambda result: result.requests.migrations_per_request,
        ),
        Metric(
            name="failed_moves", label="failed moves, whole run", unit="%", scale=100, digits=1, value=_failed_moves
        ),
        Metric(name="refused", label="refused", value=lambda result: float(result.refused)),
        Metric(name="cut", label="cut short", value=lambda result: float(result.requests.cut)),
        Metric(
            name="variation",
            label="spread of resident tokens",
            unit="%",
            scale=100,
            digits=1,
            value=lambda result: result.spread.variation,
        ),
        Metric(
            name="kv_use_most",
            label="highest KV use",
            unit="%",
            scale=100,
            digits=1,
            value=lambda result: result.spread.kv_use_most,
        ),
        Metric(
            name="output_tokens_per_s",
            label="output tokens per s",
            more_is_better=True,
            value=_output_tokens_per_s,
        ),
    )
}
"""By name; of the measured requests where no label says "whole run". Goodput has one for each SLO, from
``goodput_metric``."""


def metric(name: str) -> Metric:
    """One of METRICS. Raises KeyError."""
    return METRICS[name]


def slo_text(slo: Slo) -> str:
    """An SLO in words."""
    return f"TTFT {slo.ttft_s:g} s, TPOT {slo.tpot_s * 1e3:g} ms"


def goodput_metric(slo: Slo) -> Metric:
    """Requests per second that met ``slo``; NaN for a result that was not judged by it, or where all requests arrived
    at once."""

    def value(result: SimulationResult) -> float:
        if result.measured_s <= 0:
            return float("nan")
        return next((found.per_s for found in result.goodput if found.slo == slo), float("nan"))

    return Metric(
        name=f"goodput {slo.ttft_s:g} {slo.tpot_s:g}",
        label=f"goodput ({slo_text(slo)})",
        value=value,
        unit="/s",
        digits=3,
        more_is_better=True,
    )


def share_metric(slo: Slo) -> Metric:
    """The part of the measured requests that met ``slo``."""

    def value(result: SimulationResult) -> float:
        return next((found.share for found in result.goodput if found.slo == slo), float("nan"))

    return Metric(
        name=f"share {slo.ttft_s:g} {slo.tpot_s:g}",
        label=f"within {slo_text(slo)}",
        value=value,
        unit="%",
        scale=100,
        digits=1,
        more_is_better=True,
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """The runs of ``strategy`` at ``load``, one for each seed, by seed."""

    strategy: str
    load: float | None
    results: tuple[SimulationResult, ...]

    def of(self, metric: Metric) -> Interval:
        """The mean over the seeds, in the metric's own measure (not scaled)."""
        return interval([metric.value(result) for result in self.results])

    def ratio_to(self, other: Cell, metric: Metric) -> Interval:
        """How many times ``other``'s value this one's is, seed by seed: the same seed is the same workload."""
        return ratio_interval(self._pairs(other, metric))

    @property
    def measured(self) -> int:
        """Requests that were measured, over all seeds."""
        return sum(result.requests.measured for result in self.results)

    @property
    def finished(self) -> int:
        """Those of them that got all of their tokens."""
        return sum(result.finished for result in self.results)

    def difference_to(self, other: Cell, metric: Metric) -> Interval:
        """How much more than ``other``'s value this one's is, seed by seed."""
        return interval([after - before for before, after in self._pairs(other, metric)])

    def _pairs(self, other: Cell, metric: Metric) -> list[tuple[float, float]]:
        """(``other``'s value, this one's) for each seed that both have."""
        by_seed = {result.config.seed: metric.value(result) for result in other.results}
        return [
            (by_seed[result.config.seed], metric.value(result))
            for result in self.results
            if result.config.seed in by_seed
        ]


@dataclass(frozen=True, slots=True)
class Summary:
    """Cells by (strategy, load); ``strategies`` and ``loads`` in the order in which they are shown. A load of None is a
    trace as it is."""

    strategies: tuple[str, ...]
    loads: tuple[float | None, ...]
    slos: tuple[Slo, ...]
    cells: Mapping[tuple[str, float | None], Cell]

    def cell(self, strategy: str, load: float | None) -> Cell | None:
        """None where it was not run."""
        return self.cells.get((strategy, load))

    def line(self, strategy: str) -> tuple[Cell, ...]:
        """A strategy's cells by load."""
        return tuple(cell for load in self.loads if (cell := self.cell(strategy, load)) is not None)

    @property
    def results(self) -> tuple[SimulationResult, ...]:
        """All of them, by strategy, load and seed."""
        return tuple(result for name in self.strategies for cell in self.line(name) for result in cell.results)


def strategy_name(config: SimulationConfig) -> str:
    """What a result's line is named by, unless told otherwise."""
    return config.strategy.name


def request_rate(config: SimulationConfig) -> float | None:
    """What a result's place on its line is, unless told otherwise."""
    return config.workload.rate


def summarise(
    results: Iterable[SimulationResult],
    *,
    line_of: Callable[[SimulationConfig], str] = strategy_name,
    load_of: Callable[[SimulationConfig], float | None] = request_rate,
) -> Summary:
    """Group ``results``: lines in the order of their first result, loads ascending. Raises ValueError for two results
    of one line, load and seed, or none at all."""
    grouped: dict[tuple[str, float | None], list[SimulationResult]] = {}
    slos: dict[Slo, None] = {}
    for result in results:
        grouped.setdefault((line_of(result.config), load_of(result.config)), []).append(result)
        slos.update(dict.fromkeys(result.config.slos))
    if not grouped:
        raise ValueError("there are no results to summarise")
    cells = {}
    for (strategy, load), runs in grouped.items():
        runs.sort(key=lambda result: result.config.seed)
        if len({result.config.seed for result in runs}) < len(runs):
            raise ValueError(f"{strategy} at {load} has two runs of one seed: group them by what they differ in")
        cells[strategy, load] = Cell(strategy, load, tuple(runs))
    return Summary(
        strategies=tuple(dict.fromkeys(strategy for strategy, _ in cells)),
        loads=_ascending([load for _, load in cells]),
        slos=tuple(slos),
        cells=cells,
    )


def _ascending(loads: Sequence[float | None]) -> tuple[float | None, ...]:
    known = sorted({load for load in loads if load is not None})
    return (None, *known) if None in loads else tuple(known)
