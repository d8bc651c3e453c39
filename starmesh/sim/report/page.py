"""The whole report as one HTML page that needs nothing else: no network, no library, style and script inside.

Owns the page's parts and their order. The plots are ``plots``', the sentences ``words``'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from starmesh.policy.rescheduling.plain import to_plain
from starmesh.profiles import Profile
from starmesh.sim.report import plots
from starmesh.sim.report.summary import METRICS, Cell, Metric, Summary, goodput_metric, share_metric
from starmesh.sim.report.table import load_text, number
from starmesh.sim.report.words import conclusions
from starmesh.sim.result import SimulationResult

_ASSETS = Path(__file__).parent


def page(summary: Summary, *, title: str = "starmesh simulate", command: str = "") -> str:
    """The page. ``command`` is what made it."""
    load = summary.loads[-1]
    at_load = [cell for name in summary.strategies if (cell := summary.cell(name, load)) is not None]
    where = f"at {load_text(load)} requests/s" if load is not None else "with the trace as it is"
    seed = at_load[0].results[0].config.seed
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in conclusions(summary))
    sections = [
        f'<section><h2>What it comes to</h2><ul class="said">{said}</ul></section>',
        _section(
            "Against load" if len(summary.loads) > 1 else "Side by side",
            _load_plots(summary),
            "Bands and whiskers are 95 % intervals over the seeds.",
        ),
        _section(
            f"Over time, {where}",
            plots.over_time_plots(summary, load),
            f"One run of each strategy, seed {seed}, until the last answer is done.",
        ),
        _section(f"Each decode instance over time, {where}", plots.instance_maps(summary, load)),
        _section(
            "Distributions",
            [plots.tpot_distribution_plot(summary, load), plots.length_plot(at_load[0].results[0])],
        ),
        f"<section><h2>Moves, {escape(where)}</h2>{_migrations(at_load)}</section>",
        f"<section><h2>All numbers</h2>{_numbers(summary)}</section>",
        f"<section><h2>Configuration</h2>{_configurations(summary.results, command)}</section>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_asset('page.css')}</style></head><body>"
        f"<header><h1>{escape(title)}</h1><p>{escape(set_up(summary))}</p></header><main>{''.join(sections)}</main>"
        f'<div id="tip" role="status" hidden></div><script>{_asset("page.js")}</script></body></html>\n'
    )


def set_up(summary: Summary) -> str:
    """What was simulated, in a line."""
    configs = [result.config for result in summary.results]
    first = configs[0]
    profiles = dict.fromkeys(config.profile.name for config in configs)
    clusters = dict.fromkeys(f"{config.prefill_instances}P{config.decode_instances}D" for config in configs)
    loads = dict.fromkeys(config.workload.trace_path or config.workload.lengths for config in configs)
    seeds = len({config.seed for config in configs})
    tokens = sum(result.execution.simulated_tokens for result in summary.results)
    return (
        f"{', '.join(clusters)} of {', '.join(profiles)} with {first.profile.kv_tokens:,} tokens of KV memory each; "
        f"requests: {', '.join(loads)}; {len(configs)} runs with {seeds} seed{'s' if seeds > 1 else ''}, "
        f"{tokens / 1e6:,.1f} million output tokens."
    )


def _load_plots(summary: Summary) -> list[str]:
    against = [plots.tpot_plot(summary)]
    against.extend(plots.goodput_plot(summary, slo) for slo in summary.slos)
    names = ("ttft_p99", "preemptions", "migrations_per_request", "variation")
    shown = (METRICS[name] for name in names)
    against.extend(plots.line_plot(summary, each) for each in shown if any(map(each.value, summary.results)))
    return against


def _section(heading: str, drawings: Sequence[str], note: str = "") -> str:
    figures = "".join(f"<figure>{drawing}</figure>" for drawing in drawings)
    said = f"<p>{escape(note)}</p>" if note else ""
    return f'<section><h2>{escape(heading)}</h2>{said}<div class="plots">{figures}</div></section>'


def _migrations(cells: Iterable[Cell]) -> str:
    rows = []
    for cell in cells:
        counts: dict[tuple[str, str], int] = {}
        for result in cell.results:
            for count in result.migrations.counts:
                key = (count.reason.value, count.outcome)
                counts[key] = counts.get(key, 0) + count.count
        for (reason, outcome), total in sorted(counts.items()):
            rows.append([cell.strategy, reason, outcome, f"{total / len(cell.results):,.1f}"])
        moved = [result.migrations for result in cell.results if result.migrations.moved]
        if moved:
            size = sum(found.size_bytes for found in moved) / len(cell.results)
            gap_s = max(found.stood_still.p99 for found in moved)
            rows.append(
                [cell.strategy, "all", "moved bytes; P99 of the gap", f"{size / 1e9:,.2f} GB; {gap_s * 1e3:.0f} ms"]
            )
    if not rows:
        return "<p>Nothing moved.</p>"
    note = "<p>All moves of the run, those of warm-up included.</p>"
    return note + _table(["strategy", "reason", "outcome", "for each run"], rows, left=3)


def _numbers(summary: Summary) -> str:
    shown: list[Metric] = list(METRICS.values())
    for slo in summary.slos:
        shown += [goodput_metric(slo), share_metric(slo)]
    rows = [
        [load_text(load), name, str(len(cell.results)), *(number(cell.of(metric), metric) for metric in shown)]
        for load in summary.loads
        for name in summary.strategies
        if (cell := summary.cell(name, load)) is not None
    ]
    headings = [metric.label + (f", {metric.unit}" if metric.unit else "") for metric in shown]
    return _table(["requests/s", "strategy", "seeds", *headings], rows, left=2)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """The first ``left`` columns are text, the others numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{'' if place < left else ' class=n'}>{escape(value)}</{tag}>" for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{cells("th", headings)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _configurations(results: Sequence[SimulationResult], command: str) -> str:
    """Everything that it takes to run it again: profiles once each, and each run with the name of its profile."""
    profiles: dict[str, Profile] = {}
    runs = []
    for result in results:
        name = _kept(profiles, result.config.profile)
        config = to_plain(result.config)
        assert isinstance(config, dict)
        runs.append(
            {
                "config": config | {"profile": name},
                "code_version": result.code_version,
                "trace_digest": result.trace_digest,
                "digest": result.digest,
                "execution": to_plain(result.execution),
            }
        )
    parts = [f"<p>Made by <code>{escape(command)}</code></p>"] if command else []
    parts += [_folded(f"Profile {name}", to_plain(profile)) for name, profile in profiles.items()]
    parts += [
        _folded(f"{result.config.strategy.name}, {load_text(result.config.workload.rate)}, {result.config.seed}", run)
        for result, run in zip(results, runs, strict=True)
    ]
    return "".join(parts)


def _kept(profiles: dict[str, Profile], profile: Profile) -> str:
    """The name of a profile among those kept: different ones of the same name are numbered."""
    name, number_ = profile.name, 1
    while profiles.setdefault(name, profile) != profile:
        number_ += 1
        name = f"{profile.name} ({number_})"
    return name


def _folded(summary: str, content: object) -> str:
    text = escape(json.dumps(content, indent=1))
    return f"<details><summary>{escape(summary)}</summary><pre>{text}</pre></details>"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
