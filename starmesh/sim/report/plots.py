"""Which plots there are of a summary, each as an SVG that stands alone.

Owns what is plotted against what. The drawing is ``svg``'s and ``heat_map``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from starmesh.sim.config import Slo
from starmesh.sim.histogram import QUANTILES
from starmesh.sim.report.heat_map import heat_map
from starmesh.sim.report.summary import METRICS, Cell, Metric, Summary, goodput_metric
from starmesh.sim.report.svg import COLOURS, REFERENCE, Line, Point, bar_chart, histogram, line_chart
from starmesh.sim.report.table import number
from starmesh.sim.report.words import is_bound
from starmesh.sim.result import SimulationResult
from starmesh.sim.series import TimeSeries

RATE_LABEL = "requests per second"
_TIME_LABEL = "virtual time, s"


def colours(summary: Summary) -> dict[str, int]:
    """The colour of each strategy, the same in all plots; the bound's is set apart."""
    policies = [name for name in summary.strategies if not is_bound(summary.line(name)[0])]
    return {name: policies.index(name) % COLOURS if name in policies else REFERENCE for name in summary.strategies}


def line_plot(
    summary: Summary, metric: Metric, *, title: str = "", x_label: str = RATE_LABEL, log_y: bool | None = None
) -> str:
    """A metric against the load, a line with its 95 % interval for each strategy; where there is but one load, a bar
    for each."""
    title = title or metric.label
    unit = f"{metric.label}, {metric.unit}" if metric.unit else metric.label
    chosen = colours(summary)
    if len(summary.loads) == 1:
        cells = [(name, cell) for name in summary.strategies for cell in summary.line(name)]
        return bar_chart(
            [(name, chosen[name], _point(cell, metric)) for name, cell in cells], title=title, x_label=unit
        )
    lines = [
        Line(name, chosen[name], tuple(_point(cell, metric) for cell in summary.line(name) if cell.load is not None))
        for name in summary.strategies
    ]
    return line_chart(lines, title=title, x_label=x_label, y_label=unit, log_y=log_y)


def tpot_plot(summary: Summary, *, title: str = "P99 TPOT", x_label: str = RATE_LABEL) -> str:
    """P99 TPOT against the load."""
    return line_plot(summary, METRICS["tpot_p99"], title=title, x_label=x_label)


def goodput_plot(summary: Summary, slo: Slo, *, title: str = "", x_label: str = RATE_LABEL) -> str:
    """Goodput under ``slo`` against the load."""
    return line_plot(summary, goodput_metric(slo), title=title, x_label=x_label, log_y=False)


def tpot_distribution_plot(summary: Summary, load: float | None) -> str:
    """TPOT by the part of the requests that are slower, the tail spread out."""
    levels = [quantile for quantile in QUANTILES if 0.01 <= quantile <= 0.999]
    lines = []
    for name, colour in colours(summary).items():
        cell = summary.cell(name, load)
        if cell is None:
            continue
        points = []
        for level in levels:
            tpot_s = _mean([result.tpot.quantile(level) for result in cell.results])
            points.append(Point(_nines(level), tpot_s * 1e3, tip=f"P{level * 100:g}"))
        lines.append(Line(name, colour, tuple(points), marks=False))
    return line_chart(
        lines,
        title="TPOT of all requests, the slowest to the right",
        x_label="quantile",
        y_label="TPOT, ms",
        x_ticks=[(_nines(level), f"P{level * 100:g}") for level in (0.5, 0.9, 0.99, 0.999)],
    )


def over_time_plots(summary: Summary, load: float | None) -> list[str]:
    """Spread, fullest instance, queue, preemptions and migrations over the time of one run of each strategy; those that
    are 0 throughout are left out."""
    runs = {name: cell.results[0] for name in summary.strategies if (cell := summary.cell(name, load)) is not None}
    chosen = colours(summary)

    def plot(title: str, y_label: str, values: Callable[[TimeSeries], Iterable[float | None]], scale: float) -> str:
        if not any(value for run in runs.values() for value in values(run.series)):
            return ""
        lines = []
        for name, run in runs.items():
            points = tuple(
                Point(
                    (place + 0.5) * run.series.resolution_s,
                    math.nan if value is None else value * scale,
                    tip=f"{place * run.series.resolution_s:g} s",
                )
                for place, value in enumerate(values(run.series))
            )
            lines.append(Line(name, chosen[name], points, marks=False))
        return line_chart(lines, title=title, x_label=_TIME_LABEL, y_label=y_label, log_y=False, height=260)

    drawn = [
        plot("How unevenly resident tokens lie", "variation, %", lambda series: series.variation, 100),
        plot("The fullest instance", "KV use, %", _fullest, 100),
        plot("Waiting on decode instances", "sequences", lambda series: series.waiting_sequences, 1),
        plot("Preemptions so far", "preemptions", lambda series: series.preemptions, 1),
        plot("Moves so far", "sequences moved", lambda series: series.migrations, 1),
    ]
    return [drawing for drawing in drawn if drawing]


def instance_maps(summary: Summary, load: float | None) -> list[str]:
    """Resident tokens and KV use of each decode instance over time, for one run of each strategy, on one scale."""
    runs = {name: cell.results[0] for name in summary.strategies if (cell := summary.cell(name, load)) is not None}
    policies = {name: run for name, run in runs.items() if not run.config.strategy.perfect_balance}
    most = max(
        (tokens for run in policies.values() for row in run.series.resident_tokens for tokens in row if tokens),
        default=1.0,
    )
    maps = []
    for name, run in policies.items():
        series = run.series
        maps.append(
            heat_map(
                series.resident_tokens,
                series.instance_ids,
                title=f"{name}: resident tokens",
                resolution_s=series.resolution_s,
                most=most,
            )
        )
        maps.append(
            heat_map(
                [[None if use is None else use * 100 for use in row] for row in series.kv_use],
                series.instance_ids,
                title=f"{name}: KV use",
                resolution_s=series.resolution_s,
                most=100.0,
                unit=" %",
            )
        )
    return maps


def length_plot(result: SimulationResult) -> str:
    """Output lengths of one run's requests."""
    lengths = result.output_lengths
    return histogram(lengths.edges, lengths.counts, title="Output lengths", x_label="output tokens", y_label="requests")


def _point(cell: Cell, metric: Metric) -> Point:
    found = cell.of(metric)
    load = "" if cell.load is None else f" at {cell.load:g}"
    tip = f"{cell.strategy}{load}: {metric.label} {number(found, metric)} {metric.unit}".rstrip()
    scale = metric.scale
    x = math.nan if cell.load is None else cell.load
    return Point(x, found.mean * scale, found.low * scale, found.high * scale, tip)


def _fullest(series: TimeSeries) -> Iterable[float | None]:
    for place in range(series.points):
        yield max((use for row in series.kv_use if (use := row[place]) is not None), default=None)


def _nines(level: float) -> float:
    """0.9 as 1, 0.99 as 2: so the tail gets its room."""
    return -math.log10(1 - level)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
