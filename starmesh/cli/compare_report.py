"""The policies of ``starmesh compare`` side by side, as a table, as lines over time, and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from starmesh.cli.bench_report import percentile
from starmesh.cli.compare import Moment, PolicyRun
from starmesh.cli.status import spread

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 48


def comparison(runs: Sequence[PolicyRun]) -> RenderableType:
    """The table, a column for each policy, and the spread of resident tokens over time."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(run.policy, justify="right")
    contents = [run_json(run) for run in runs]

    def row(label: str, values: Sequence[float | int | None], form: str) -> None:
        table.add_row(label, *("-" if value is None else format(value, form) for value in values))

    for name, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "ITL")):
        for quantile in ("p50", "p99"):
            values = [content[name][quantile] for content in contents]
            row(f"{label} {quantile}, ms", [None if value is None else value * 1e3 for value in values], ".1f")
    row("all done after, s", [content["duration_s"] for content in contents], ".1f")
    row("output tokens per s", [content["output_tokens_per_s"] for content in contents], ".1f")
    row("goodput, requests per s", [content["goodput_requests_per_s"] for content in contents], ".3f")
    slo = f"TTFT {runs[0].report.slo_ttft_s:g} s and TPOT {runs[0].report.slo_tpot_s:g} s" if runs else "the SLOs"
    row(f"within {slo}", [run.report.good_share for run in runs], ".0%")
    row("spread of resident tokens, mean", [content["spread_tokens"]["mean"] for content in contents], ".0f")
    row("spread of resident tokens, p90", [content["spread_tokens"]["p90"] for content in contents], ".0f")
    row("sequences moved", [content["migrated_sequences"] for content in contents], "d")
    row("preemptions", [content["preemptions"] for content in contents], "d")
    return Group(table, Text(), *_lines(runs))


def run_json(run: PolicyRun) -> dict[str, Any]:
    """What one policy made of the load: the report of ``starmesh bench``, and what was seen of the instances."""
    busy = busy_moments(run.moments)
    spreads = [spread(moment.resident_tokens) for moment in busy]
    first, last = (run.moments[0], run.moments[-1]) if run.moments else (None, None)
    return {
        "policy": run.policy,
        **run.report.to_json(),
        "spread_tokens": {
            "mean": round(sum(spreads) / len(spreads), 1) if spreads else None,
            "p90": round(percentile(spreads, 0.9), 1) if spreads else None,
        },
        "migrated_sequences": last.migrated_sequences - first.migrated_sequences if first and last else 0,
        "preemptions": last.preemptions - first.preemptions if first and last else 0,
        "moments": [
            {"at_s": round(moment.at_s, 3), "resident_tokens": list(moment.resident_tokens)} for moment in busy
        ],
    }


def busy_moments(moments: Sequence[Moment]) -> list[Moment]:
    """Those at which anything was resident: before and after the load all policies are alike."""
    return [moment for moment in moments if any(moment.resident_tokens)]


def _lines(runs: Sequence[PolicyRun]) -> list[Text]:
    """The spread over time, a line for each policy, all on one scale."""
    end_s = max((moment.at_s for run in runs for moment in run.moments), default=0.0)
    bins = {run.policy: _binned(run.moments, end_s) for run in runs}
    top = max((value for values in bins.values() for value in values), default=0.0)
    if top <= 0:
        return []
    width = max(len(run.policy) for run in runs)
    lines = [Text(f"spread of resident tokens over {end_s:.0f} s, up to {top:.0f}:")]
    for policy, values in bins.items():
        line = "".join(_BARS[round(value / top * (len(_BARS) - 1))] for value in values)
        lines.append(Text(f"{policy:<{width}} |{line}|"))
    return lines


def _binned(moments: Sequence[Moment], end_s: float) -> list[float]:
    """The mean spread in each of the equal parts of the time until ``end_s``; 0 where nothing was seen."""
    sums = [0.0] * _WIDTH
    counts = [0] * _WIDTH
    for moment in moments:
        place = min(int(moment.at_s / end_s * _WIDTH), _WIDTH - 1) if end_s > 0 else 0
        sums[place] += spread(moment.resident_tokens)
        counts[place] += 1
    return [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]
