"""Tables and plots of experiments, put into docs/results.md between markers; the words around them stay."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.results.experiments import BOUND, Experiment
from starmesh.sim.report.plots import goodput_plot, tpot_plot
from starmesh.sim.report.summary import METRICS, Cell, Metric, Summary, goodput_metric, summarise
from starmesh.sim.report.table import number
from starmesh.sim.result import SimulationResult

BASELINES = ("vllm_round_robin", "least_tokens")
"""What changes are told against: the paper's baseline, and static dispatch by current load behind our admission."""

_METRICS = ("tpot_mean", "tpot_p99", "ttft_p99")
_COUNTS = ("preemptions", "migrations_per_request", "failed_moves")


class PageError(ValueError):
    """The page lacks the markers of an experiment."""


def summary_of(experiment: Experiment, results: list[SimulationResult]) -> Summary:
    """Lines are strategies, loads are places on the experiment's axis."""
    return summarise(results, load_of=experiment.place_of)


def markdown(experiment: Experiment, summary: Summary) -> str:
    """A table with a row for each place and strategy, 95 % intervals over seeds; beside P99 TPOT how it compares with
    the baselines', seed by seed, and beside goodput the ratio of the means."""
    metrics: list[Metric] = [METRICS[name] for name in _METRICS]
    metrics += [goodput_metric(slo) for slo in summary.slos]
    metrics += [METRICS[name] for name in _COUNTS]
    baselines = [name for name in BASELINES if name in summary.strategies]
    heads = [experiment.axis, "strategy"]
    for metric in metrics:
        heads.append(f"{metric.label}{', ' + metric.unit if metric.unit else ''}")
        if metric.name == "tpot_p99":
            heads += [f"to {baseline}'s" for baseline in baselines]
        elif metric.name.startswith("goodput") and baselines:
            heads.append(f"times {baselines[0]}'s")
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for load in summary.loads:
        label = "" if load is None else f"{load:g}"
        for name in summary.strategies:
            cell = summary.cell(name, load)
            if cell is None:
                continue
            row = [label, f"*{name}*" if name == BOUND else name]
            for metric in metrics:
                row.append(number(cell.of(metric), metric))
                if metric.name == "tpot_p99":
                    row += [_change(cell, summary.cell(baseline, load), metric) for baseline in baselines]
                elif metric.name.startswith("goodput") and baselines:
                    row.append(_times(cell, summary.cell(baselines[0], load), metric))
            lines.append("| " + " | ".join(row) + " |")
            label = ""
    return "\n".join(lines)


def _change(cell: Cell, baseline: Cell | None, metric: Metric) -> str:
    if baseline is None or cell.strategy == baseline.strategy:
        return ""
    ratio = cell.ratio_to(baseline, metric)
    return f"{(ratio.mean - 1) * 100:+.1f} %"


def _times(cell: Cell, baseline: Cell | None, metric: Metric) -> str:
    """Of the means: one seed of a collapsed baseline may have no goodput at all."""
    if baseline is None or cell.strategy == baseline.strategy or not baseline.of(metric).mean:
        return ""
    return f"{cell.of(metric).mean / baseline.of(metric).mean:.2f}"


def plots(experiment: Experiment, summary: Summary, directory: Path) -> None:
    """P99 TPOT and goodput over the axis, as SVG files."""
    if len(summary.loads) < 2:
        return
    drawings = {"tpot": tpot_plot(summary, title=f"P99 TPOT: {experiment.title}", x_label=experiment.axis)}
    drawings["goodput"] = goodput_plot(summary, summary.slos[0], x_label=experiment.axis)
    for kind, drawing in drawings.items():
        (directory / f"results_{experiment.name}_{kind}.svg").write_text(drawing)


def replace_between(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the markers of ``name`` replaced. Raises PageError."""
    pattern = re.compile(rf"(<!-- {name} begins -->\n).*?(<!-- {name} ends -->)", re.DOTALL)
    replaced, count = pattern.subn(lambda found: f"{found[1]}{content}\n{found[2]}", text)
    if count != 1:
        raise PageError(f"docs/results.md needs the markers <!-- {name} begins --> and <!-- {name} ends --> once")
    return replaced
