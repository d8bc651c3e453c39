"""The table for the terminal: a row for each strategy and load. Owns its columns and how a number is written."""

from __future__ import annotations

import math
from typing import Final

from rich.table import Table

from starmesh.sim.report.intervals import Interval
from starmesh.sim.report.summary import METRICS, Metric, Summary, goodput_metric

_COLUMNS = ("tpot_p50", "tpot_p99", "ttft_p99")
_COUNTS = ("preemptions", "migrations_per_request", "refused")
_HEADINGS: Final = {
    "tpot_p50": "P50\nTPOT\nms",
    "tpot_p99": "P99\nTPOT\nms",
    "ttft_p99": "P99\nTTFT\ns",
    "preemptions": "pre-\nempted",
    "migrations_per_request": "moves\nper\nrequest",
    "refused": "re-\nfused",
}


def columns(summary: Summary) -> tuple[Metric, ...]:
    """What is shown of each cell."""
    goodput = tuple(goodput_metric(slo) for slo in summary.slos)
    return (*(METRICS[name] for name in _COLUMNS), *goodput, *(METRICS[name] for name in _COUNTS))


def number(found: Interval, metric: Metric, *, intervals: bool = True) -> str:
    """A value with half of its interval, in the metric's unit; "-" where nothing was measured."""
    if math.isnan(found.mean):
        return "-"
    text = f"{found.mean * metric.scale:,.{metric.digits}f}"
    half = found.half * metric.scale
    return (
        text
        if not intervals or math.isnan(half) or round(half, metric.digits) == 0
        else f"{text} ±{half:,.{metric.digits}f}"
    )


def heading(metric: Metric) -> str:
    """A column's heading, on lines as short as its values."""
    if metric.name in _HEADINGS:
        return _HEADINGS[metric.name]
    label, _, slo = metric.label.partition(" (")
    limits = slo.removesuffix(")").replace("TTFT ", "").replace("TPOT ", "").replace(", ", "\n")
    return f"{label}\nper s\n{limits}"


def load_text(load: float | None) -> str:
    """A load for people."""
    return "as traced" if load is None else f"{load:g}"


def table(summary: Summary, *, intervals: bool = True) -> Table:
    """The strategies of each load together, the lightest load first; with 95 % ``intervals``, if there is room."""
    shown = columns(summary)
    result = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    result.add_column("requests\nper s", justify="right")
    result.add_column("strategy", no_wrap=True)
    for metric in shown:
        result.add_column(heading(metric), justify="right", no_wrap=True)
    for load in summary.loads:
        label = load_text(load)
        for name in summary.strategies:
            cell = summary.cell(name, load)
            if cell is not None:
                result.add_row(label, name, *(number(cell.of(metric), metric, intervals=intervals) for metric in shown))
                label = ""
        result.add_section()
    return result
