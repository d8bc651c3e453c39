"""One frame of ``starmesh top``: a cluster, its latencies, moves and rounds, as much of them as the terminal holds.

Owns the order of things and what gives way where there is no room. Owns no asking (``top``); what ``starmesh status``
shows too is made there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from google.protobuf.duration_pb2 import Duration
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from starmesh.cli.status import balance_line, name_of, state_of
from starmesh.cli.top_words import move_line, round_line, seconds_of, span_of
from starmesh.v1 import cluster_pb2

_BAR: Final = 20
_WIDE: Final = 96
"""Columns from which the time of a step is shown too."""
_LOG_LINES: Final = 12
"""Moves, and rounds, without a terminal's height to keep to."""
_LEAST_LOG_LINES: Final = 3
_SPARKS: Final = "▁▂▃▄▅▆▇█"
_LATENCIES: Final = (("TTFT", "ttft"), ("TPOT", "tpot"), ("end to end", "end_to_end"))


@dataclass(frozen=True, slots=True)
class TopView:
    """``response`` with the output tokens per second of each instance; ``height`` in lines, None for as many as it
    takes."""

    response: cluster_pb2.WatchClusterResponse
    rates: dict[str, float]
    height: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        response, width = self.response, options.max_width
        head = [_title(response, width), *_summary(response), _latencies(response, width)]
        with_kv = [instance for instance in response.instances if instance.load.total_blocks]
        others = [instance for instance in response.instances if not instance.load.total_blocks]
        logs: list[tuple[str, list[Text]]] = [
            ("moves", [move_line(move) for move in response.migrations] or [Text("nothing has moved yet", "dim")]),
            ("rounds", [round_line(told) for told in response.rounds] or [Text("no rescheduler leads", "dim")]),
        ]
        # Latencies are four lines; a heading for the table and each log, and a line for the others.
        fixed = len(head) + 3 + 1 + bool(others) + len(logs)
        rows, lines = len(with_kv), _LOG_LINES
        if self.height is not None:
            room = max(0, self.height - fixed)
            rows = min(rows, max(1, room - len(logs) * _LEAST_LOG_LINES))
            lines = max(1, (room - rows) // len(logs))
        # One line says what is left out.
        shown = with_kv if rows == len(with_kv) else _fullest(with_kv, max(0, rows - 1))
        yield Group(*head, self._instances(shown, hidden=len(with_kv) - len(shown), width=width))
        if others:
            names = (Text.assemble(name_of(instance), " ", state_of(instance)) for instance in others)
            yield _cut(Text(", ").join(names), width)
        for title, said in logs:
            yield Text(title, style="bold")
            yield from (_cut(line, width) for line in said[:lines])

    def _instances(self, instances: Sequence[cluster_pb2.Instance], *, hidden: int, width: int) -> RenderableType:
        table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
        table.add_column("instance", no_wrap=True, max_width=16)
        table.add_column("state", no_wrap=True)
        table.add_column("KV in use, expected peak", no_wrap=True)
        headings = ("tokens now", "at the ends", "run", "wait", "out/s")
        for heading in (*headings, *(("step ms",) if width >= _WIDE else ())):
            table.add_column(heading, justify="right", no_wrap=True)
        for instance in instances:
            load = instance.load
            rate = self.rates.get(instance.instance_id)
            cells: list[str | Text] = [
                *(name_of(instance), state_of(instance), _bar(instance)),
                *(_count(load.resident_tokens), _count(max(load.resident_tokens, instance.predicted_tokens))),
                *(str(load.running_sequences), str(load.waiting_sequences)),
                "" if rate is None else f"{rate:.0f}",
            ]
            if width >= _WIDE:
                cells.append(f"{seconds_of(load.step_duration) * 1e3:.0f}")
            table.add_row(*cells)
        if not hidden:
            return table
        return Group(table, Text(f"and {hidden} whose KV is less in use", style="dim"))


def _title(response: cluster_pb2.WatchClusterResponse, width: int) -> Text:
    at = response.observe_time.ToDatetime().strftime("%H:%M:%S UTC")
    title = Text.assemble(("starmesh top", "bold"), f"  {response.router_id}  {at}")
    if not response.ledger_available:
        title.append("  the ledger does not answer: as last seen", style="red")
    hint = "q quits"
    gap = width - title.cell_len - len(hint)
    return title.append(" " * gap + hint, style="dim") if gap > 1 else _cut(title, width)


def _summary(response: cluster_pb2.WatchClusterResponse) -> Iterator[Text]:
    activity = response.activity
    window = span_of(seconds_of(activity.window))
    yield Text(
        f"requests {response.active_requests} active, {response.queued_requests} queued, "
        f"{activity.requests_per_second:.1f}/s; tokens {activity.tokens_per_second:.0f}/s; "
        f"in {window} {activity.finished_requests} done, {activity.failed_requests} failed",
        no_wrap=True,
        overflow="ellipsis",
    )
    if (balance := balance_line(response)) is not None:
        balance.no_wrap, balance.overflow = True, "ellipsis"
        yield balance
    if response.HasField("predictor"):
        scored = [quality for quality in response.predictor.qualities if quality.estimates]
        line = f"predictor: {response.predictor.version or 'nothing yet'}"
        if estimates := sum(quality.estimates for quality in scored):
            error = sum(quality.estimates * quality.mae_tokens for quality in scored) / estimates
            coverage = sum(quality.estimates * quality.coverage for quality in scored) / estimates
            line += f"; mean error {error:.0f} tokens, {coverage:.0%} within its upper bound"
        yield Text(line, no_wrap=True, overflow="ellipsis")


def _latencies(response: cluster_pb2.WatchClusterResponse, width: int) -> RenderableType:
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("latency", no_wrap=True, min_width=10)
    for heading in ("p50", "p90", "p99"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=8)
    table.add_column("p99 of late", no_wrap=True, max_width=max(10, width - 42))
    for title, field in _LATENCIES:
        latency: cluster_pb2.LatencySummary = getattr(response.activity, field)
        quantiles = (latency.p50, latency.p90, latency.p99)
        cells = (span_of(seconds_of(quantile)) if latency.count else "-" for quantile in quantiles)
        table.add_row(title, *cells, Text(_sparks(latency.p99_history), style="cyan"))
    return table


def _sparks(history: Iterable[Duration]) -> str:
    values = [seconds_of(value) for value in history]
    most = max(values, default=0.0)
    return "".join(
        _SPARKS[min(len(_SPARKS) - 1, int(value / most * len(_SPARKS)))] if value > 0 else " " for value in values
    )


def _bar(instance: cluster_pb2.Instance) -> Text:
    """KV in use, what is reserved, and a mark where the peak is expected; its colour tells of one that will not fit."""
    load = instance.load
    tokens = load.total_blocks * instance.layout.block_tokens
    used = 1 - load.free_blocks / load.total_blocks
    reserved = instance.reserved_tokens / tokens if tokens else 0.0
    peak = instance.peak_tokens / tokens if tokens else 0.0
    filled, held = round(used * _BAR), round(min(1.0, used + reserved) * _BAR)
    bar = Text("█" * filled, style="cyan")
    bar.append("▒" * (held - filled), style="cyan")
    bar.append("·" * (_BAR - held), style="dim")
    if peak:
        place = min(_BAR - 1, int(peak * _BAR))
        bar = bar[:place] + Text("│", style="bold red" if peak > 1 else "bold") + bar[place + 1 :]
    return bar.append(f" {used:4.0%}", style="red" if peak > 1 else "default")


def _fullest(instances: Sequence[cluster_pb2.Instance], count: int) -> list[cluster_pb2.Instance]:
    """Those whose KV is in use the most, in their order."""

    def free(instance: cluster_pb2.Instance) -> float:
        return instance.load.free_blocks / instance.load.total_blocks

    kept = {instance.instance_id for instance in sorted(instances, key=free)[:count]}
    return [instance for instance in instances if instance.instance_id in kept]


def _count(tokens: int) -> str:
    return str(tokens) if tokens < 10_000 else f"{tokens / 1000:.1f}k"


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line
