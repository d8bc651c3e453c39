"""What a collection says of itself: a line while it runs, and a summary of what is stored. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from starmesh.cli.bench_report import percentile
from starmesh.cli.collection_run import Tally
from starmesh.prediction.shards import StoredSequence

MAX_CUT_SHARE = 0.15
"""Above it too many of the longest answers, those that matter most, have no label."""
_QUANTILES = (0.1, 0.5, 0.9, 0.99, 1.0)


def progress_line(tally: Tally, *, counted: bool = False) -> str:
    """How far it is; ``counted``: something beside it says how many of how many."""
    parts = [] if counted else [f"{tally.done} of {tally.total} requests"]
    parts += [f"{tally.finished} finished", f"{tally.cut} cut"]
    if tally.failed:
        parts.append(f"{tally.failed} failed")
    parts.append(f"{tally.tokens_per_s:.0f} tokens/s")
    if tally.left_s is not None and tally.done < tally.total:
        parts.append(f"about {span(tally.left_s)} left")
    return ", ".join(parts)


def span(seconds: float) -> str:
    """A time for people: 42 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def run_summary(tally: Tally) -> RenderableType:
    """What this run made of its requests."""
    lines = [Text(progress_line(tally))]
    if tally.first_failure:
        lines.append(Text(f"the first that failed: {tally.first_failure}", style="yellow"))
    return Group(*lines)


def lengths_summary(lengths: Sequence[int], cut: int) -> RenderableType:
    """How long answers are, and a warning where too many of them were cut."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    share = cut / len(lengths) if lengths else 0.0
    table.add_row("cut by the limit", f"{cut}, {share:.1%}")
    if lengths:
        named = ((f"p{quantile * 100:g}" if quantile < 1 else "longest", quantile) for quantile in _QUANTILES)
        values = [f"{name} {percentile(lengths, quantile):.0f}" for name, quantile in named]
        table.add_row("output tokens", ", ".join(values))
    if share <= MAX_CUT_SHARE:
        return table
    warning = f"more than {MAX_CUT_SHARE:.0%} were cut, and have no label: collect with a higher --max-output-tokens"
    return Group(table, Text(warning, style="yellow"))


def stored_summary(directory: Path, stored: Sequence[StoredSequence], stored_bytes: int) -> RenderableType:
    """What the directory holds now, of this run and all before."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    samples = sum(sequence.samples for sequence in stored)
    table.add_row("stored", f"{len(stored)} requests, {samples} samples, {stored_bytes / 2**20:.1f} MiB in {directory}")
    lengths = [sequence.total_output_tokens for sequence in stored]
    return Group(table, lengths_summary(lengths, sum(not sequence.finished for sequence in stored)))
