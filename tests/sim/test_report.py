"""What is said and shown of results: the right numbers, the right words, and files that any reader can read."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from functools import cache
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType

from starmesh.sim.config import Slo, Strategy
from starmesh.sim.report import METRICS, Summary, conclusions, goodput_plot, page, summarise, table, tpot_plot
from starmesh.sim.report.heat_map import heat_map
from starmesh.sim.report.intervals import interval, ratio_interval, student_t
from starmesh.sim.report.svg import Axis, Line, Point, bar_chart, line_chart
from starmesh.sim.report.words import percent
from starmesh.sim.result import SimulationResult
from tests.sim.runs import config_of, result_of

pytestmark = pytest.mark.fast

SLOS = (Slo(2.0, 0.05), Slo(9.0, 0.5))
SVG = "{http://www.w3.org/2000/svg}"


def run(name: str, slowness: float, *, rate: float | None = 1.0, seed: int = 0, **changes: Any) -> SimulationResult:
    strategy = Strategy(
        name=name, rescheduling="star" if name == "star" else "none", perfect_balance=name == "perfect_balance"
    )
    config = dataclasses.replace(config_of(name, rate=rate, seed=seed, slos=SLOS), strategy=strategy, **changes)
    return result_of(config, slowness=slowness)


@cache
def compared(*, seeds: int = 3, rates: tuple[float | None, ...] = (1.0, 2.0)) -> Summary:
    """Two that place once, one that moves, and the bound; differences grow with the load."""
    slow = {"round_robin": 1.0, "least_tokens": 0.6, "star": 0.1, "perfect_balance": 0.0}
    return summarise(
        run(name, 1 + excess * ((rate or 2.0) - 1.0), rate=rate, seed=seed)
        for name, excess in slow.items()
        for rate in rates
        for seed in range(seeds)
    )


SUMMARY = compared()


def test_an_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, math.nan])
    half = 3.182 * float(np.std([1, 2, 3, 4], ddof=1)) / 2
    assert (found.mean, found.count) == (2.5, 4)
    assert [found.low, found.high] == pytest.approx([2.5 - half, 2.5 + half])
    assert math.isnan(interval([7.0]).low) and interval([7.0]).mean == 7.0
    assert math.isnan(interval([]).mean)
    assert [student_t(degrees) for degrees in (31, 60, 10**6)] == pytest.approx([2.0395, 2.0003, 1.96], abs=2e-4)
    assert ratio_interval([(2.0, 1.0), (8.0, 4.0), (0.0, 1.0)]).mean == pytest.approx(0.5)


def test_results_are_grouped_by_strategy_and_load() -> None:
    assert SUMMARY.strategies == ("round_robin", "least_tokens", "star", "perfect_balance")
    assert SUMMARY.loads == (1.0, 2.0)
    cell = SUMMARY.cell("star", 2.0)
    assert cell is not None and [result.config.seed for result in cell.results] == [0, 1, 2]
    assert cell.of(METRICS["tpot_p99"]).mean == pytest.approx(np.mean([result.tpot.p99 for result in cell.results]))
    other = SUMMARY.cell("round_robin", 2.0)
    assert other is not None
    # The same seed has drawn the same requests, so that their ratio is all but free of chance.
    ratio = cell.ratio_to(other, METRICS["tpot_p99"])
    assert ratio.mean == pytest.approx(1.1 / 2.0, rel=0.01) and ratio.high - ratio.low < 0.01
    assert len(SUMMARY.results) == 24
    with pytest.raises(ValueError, match="two runs of one seed"):
        summarise([run("star", 1.0), run("star", 1.2)])
    with pytest.raises(ValueError, match="no results"):
        summarise([])
    by_round = summarise(
        [run("star", 1.0, round_interval_s=interval_s) for interval_s in (10.0, 1.0)],
        line_of=lambda config: config.profile.name,
        load_of=lambda config: config.round_interval_s,
    )
    assert (by_round.strategies, by_round.loads) == (("tiny",), (1.0, 10.0))


def text_of(what: RenderableType) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(what)
    return file.getvalue()


def test_the_table_has_a_row_for_each_cell() -> None:
    text = text_of(table(SUMMARY))
    for name in SUMMARY.strategies:
        assert len(re.findall(rf"\b{name}\b", text)) == 2
    assert "±" in text and "50 ms" in text
    assert "±" not in text_of(table(compared(seeds=1))) + text_of(table(SUMMARY, intervals=False))


def test_a_row_is_of_the_measured_requests_and_says_so_of_what_is_not() -> None:
    found = dataclasses.replace(run("star", 1.0), preemptions=999)
    counts = dataclasses.replace(found.requests, measured=10, preemptions=7, migrations=5)
    one, other = (
        found.migrations.counts[0],
        dataclasses.replace(found.migrations.counts[0], outcome="refused", count=30),
    )
    moves = dataclasses.replace(found.migrations, counts=(one, other))
    found = dataclasses.replace(found, requests=counts, migrations=moves)
    assert one.count == 10
    names = ("preemptions", "migrations_per_request", "failed_moves")
    assert [METRICS[name].value(found) for name in names] == [7.0, 0.5, 0.75]
    assert METRICS["failed_moves"].value(run("round_robin", 1.0)) == 0.0
    assert [name for name in METRICS if "whole run" in METRICS[name].label] == ["itl_p99", "failed_moves"]
    assert "preemptions of measured requests" in page(summarise([found]))


def test_the_conclusions_say_who_is_better_and_where_it_makes_no_difference() -> None:
    said = conclusions(SUMMARY)
    first, second, *others = said
    assert first.startswith("Within TTFT 2 s, TPOT 50 ms for 95 % of the requests")
    assert second == "Within TTFT 9 s, TPOT 500 ms for 95 % of the requests, all carry 2/s, the heaviest load tried."
    (better,) = (sentence for sentence in others if "is better" in sentence)
    # Of those that place once, least_tokens does best here: it is what moving must beat.
    assert better.startswith("star is better than least_tokens: at 2/s P99 TPOT -31.")
    assert "preemptions" in better and "round_robin" not in better
    assert any("star cannot be told from least_tokens at 1/s" in sentence for sentence in others)
    assert not any("worse" in sentence for sentence in said)
    assert said[-1].startswith("In short: star rather than least_tokens gains at 2/s P99 TPOT -31.")
    assert said[-1].endswith(", nothing for sure at 1/s.")


def test_what_is_worse_is_said_as_well_and_what_may_mislead() -> None:
    said = conclusions(
        summarise(
            run(name, slowness, seed=seed)
            for name, slowness in (("least_tokens", 1.0), ("star", 1.5))
            for seed in (0, 1)
        )
    )
    assert any(sentence.startswith("star is worse than least_tokens: at 1/s P99 TPOT +") for sentence in said)
    assert said[-1] == "In short: least_tokens will do here; star is no better."
    old = dataclasses.replace(run("star", 1.0, seed=1), code_version="another")
    assert any("different versions" in sentence for sentence in conclusions(summarise([run("star", 1.0), old])))
    traced = " ".join(conclusions(compared(rates=(None,), seeds=2)))
    assert "with the trace as it is P99 TPOT" in traced and "the same for each seed" not in traced
    replayed = dataclasses.replace(config_of(rate=None).workload, lengths="trace")
    runs = [run("star", 1.0, rate=None, seed=seed, workload=replayed) for seed in (0, 1)]
    assert "of a trace are the same for each seed" in " ".join(conclusions(summarise(runs)))
    assert [percent(change) for change in (-0.25, 0.034, 1.63)] == ["-25.0 %", "+3.4 %", "2.63x"]


def test_one_seed_calls_nothing_better() -> None:
    assert not interval([7.0]).excludes_zero and not interval([-1.0, 1.0]).excludes_zero
    assert interval([1.0, 1.1]).excludes_zero
    said = conclusions(compared(seeds=1))
    assert said[-1] == "In short: one seed says nothing of chance; --seeds 5 does."
    assert not re.search("better|worse|will do|cannot be told|gains", " ".join(said))
    assert conclusions(summarise([run("star", 1.0)]))[-1] == "One seed says nothing of chance; --seeds 5 does."


def counted(found: SimulationResult, *, measured_s: float = 30.0, **counts: int) -> SimulationResult:
    return dataclasses.replace(found, measured_s=measured_s, requests=dataclasses.replace(found.requests, **counts))


def test_where_nothing_was_measured_or_served_nothing_is_concluded() -> None:
    runs = [run(name, 1.0, seed=seed) for name in ("least_tokens", "star") for seed in (0, 1)]
    (said,) = conclusions(summarise(counted(each, measured=0, finished=0) for each in runs))
    assert said.startswith("Nothing was measured: ") and "make --warm-up shorter or --duration longer" in said
    (said,) = conclusions(summarise(counted(each, finished=0, refused=each.requests.measured) for each in runs))
    assert said.startswith("Nothing was served: ") and "try lower --rates" in said
    late = [counted(run("star", 1.0, rate=2.0, seed=seed), measured=0, finished=0) for seed in (0, 1)]
    partly = " ".join(conclusions(summarise([*runs, *late])))
    assert "as all requests arrived in the warm-up: star at 2/s." in partly


def test_outputs_that_were_cut_short_are_told_of() -> None:
    runs = [counted(run("star", 1.0, seed=seed), cut=3 * seed) for seed in (0, 1)]
    summary = summarise([*runs, run("least_tokens", 1.0)])
    (said,) = (sentence for sentence in conclusions(summary) if "cut short" in sentence)
    assert said.endswith(" ends: star at 1/s.")
    assert "cut short" in page(summary)
    assert METRICS["cut"].value(runs[1]) == 3.0


def test_requests_that_arrive_at_once_have_no_goodput_per_second() -> None:
    summary = summarise(counted(run("star", 1.0, seed=seed), measured_s=0.0) for seed in (0, 1))
    assert math.isnan(METRICS["output_tokens_per_s"].value(summary.results[0]))
    assert "0.000" not in text_of(table(summary))
    assert any("arrived all at once" in sentence for sentence in conclusions(summary))
    assert not re.search(r"\bnan\b", goodput_plot(summary, SLOS[0]), re.IGNORECASE)


@pytest.mark.parametrize("summary", [SUMMARY, compared(seeds=1), compared(seeds=2, rates=(None,))])
def test_plots_stand_alone(summary: Summary) -> None:
    for drawn in (tpot_plot(summary), goodput_plot(summary, SLOS[0], title="a < b & c")):
        root = ElementTree.fromstring(drawn)
        assert root.tag == f"{SVG}svg" and root.get("aria-label")
        assert "prefers-color-scheme: dark" in (root.findtext(f"{SVG}style") or "")
        texts = {element.text for element in root.iter(f"{SVG}text")}
        assert set(summary.strategies) <= texts
        assert "nan" not in drawn.lower() and "http" not in drawn.replace("http://www.w3.org/2000/svg", "")


def test_marks_lie_where_their_values_are() -> None:
    line = Line("one", 0, (Point(1.0, 10.0, 5.0, 1000.0), Point(2.0, math.nan), Point(3.0, 20.0, 18.0, 22.0)))
    root = ElementTree.fromstring(line_chart([line], title="t", x_label="x", y_label="y"))
    reaches = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in root.iter(f"{SVG}circle")]
    assert len(reaches) == 2 and reaches[0][0] < reaches[1][0] and reaches[0][1] > reaches[1][1]
    assert all(0 < x < 640 and 0 < y < 340 for x, y in reaches)
    empty = line_chart([], title="t", x_label="x", y_label="y")
    ElementTree.fromstring(empty)
    bars = ElementTree.fromstring(bar_chart([("a", 0, Point(0, 4.0)), ("b", 1, Point(0, 2.0))], title="t", x_label="x"))
    widths = [float(bar.get("width", 0)) for bar in bars.iter(f"{SVG}rect") if bar.get("data-tip") is not None]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.2)
    assert Axis(1.0, 1000.0, 0.0, 300.0, log=True).at(10.0) == pytest.approx(100.0)
    assert Axis(0.0, 10.0, 0.0, 300.0).ticks() == [0, 2, 4, 6, 8, 10]


def test_a_heat_map_has_a_pixel_for_each_value() -> None:
    drawn = heat_map([[0.0, 5.0, None], [10.0, 2.0, 1.0]], ["a", "b"], title="t", resolution_s=2.0, most=10.0)
    (picture,) = (e for e in ElementTree.fromstring(drawn).iter(f"{SVG}image") if e.get("class") == "heat")
    assert list(base64.b64decode(picture.get("data-levels", ""))) == [1, 128, 0, 255, 52, 26]
    png = base64.b64decode(picture.get("href", "").partition(",")[2])
    assert png.startswith(b"\x89PNG") and png[16:24] == bytes([0, 0, 0, 3, 0, 0, 0, 2])
    ElementTree.fromstring(heat_map([], [], title="t", resolution_s=1.0, most=1.0))


class _Tags(HTMLParser):
    """Checks that tags match, and collects what would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("summary", [SUMMARY, compared(seeds=1, rates=(None,)), summarise([run("star", 1.0)])])
def test_the_page_is_whole_and_loads_nothing(summary: Summary) -> None:
    parser = _Tags()
    parser.feed(page(summary, title="<b>", command="starmesh simulate --x"))
    assert parser.open == []
    assert all(load.startswith("data:image/png;base64,") for load in parser.loads)
    for sentence in conclusions(summary):
        assert sentence in parser.text
    for name in summary.strategies:
        assert name in parser.text
    for result in summary.results:
        assert result.trace_digest in parser.text and result.code_version in parser.text
    assert "made up for tests" in parser.text, "the profile's provenance"
    assert "starmesh simulate --x" in parser.text


def test_profiles_of_one_name_are_told_apart() -> None:
    small = dataclasses.replace(config_of().profile, total_blocks=500)
    text = page(summarise([run("star", 1.0), run("star", 1.0, seed=1, profile=small)]))
    assert "Profile tiny</summary>" in text and "Profile tiny (2)</summary>" in text
