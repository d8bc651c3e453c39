"""What a load test measured: latencies, rates and goodput, as a table and as JSON. Pure arithmetic.

Times are the client's. TTFT counts from the request's scheduled arrival, so that a client that falls behind makes
the numbers worse, not better. TPOT is (end-to-end - TTFT) / (output tokens - 1), per request. ITL is each gap between
two tokens; tokens that came in one message have none between them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request of the test. Times are seconds since the start of the test.

    ``token_times_s`` has the arrival of each output token. ``error`` names the status code of a failure,
    ``detail`` what the router said of it.
    """

    arrival_s: float
    end_s: float
    token_times_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    recoveries: int = 0
    finish_reason: str = ""
    error: str = ""
    detail: str = ""

    @property
    def ttft_s(self) -> float | None:
        """None when no token came."""
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """None with fewer than two tokens."""
        tokens = len(self.token_times_s)
        return (self.end_s - self.token_times_s[0]) / (tokens - 1) if tokens > 1 else None

    @property
    def itl_s(self) -> list[float]:
        """The gaps between the tokens."""
        times = self.token_times_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def meets(self, *, slo_ttft_s: float, slo_tpot_s: float) -> bool:
        """Whether it succeeded within all its SLOs; a request of one token has no TPOT to miss."""
        if self.error or self.ttft_s is None:
            return False
        return self.ttft_s <= slo_ttft_s and (self.tpot_s or 0.0) <= slo_tpot_s


def percentile(values: Sequence[float], quantile: float) -> float:
    """Linear interpolation between the closest ranks (numpy's default). NaN for no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * quantile
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


@dataclass(frozen=True, slots=True)
class Report:
    """The outcomes of one test with the SLOs to judge them by."""

    outcomes: tuple[Outcome, ...]
    slo_ttft_s: float
    slo_tpot_s: float

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last end."""
        if not self.outcomes:
            return 0.0
        return max(outcome.end_s for outcome in self.outcomes) - min(outcome.arrival_s for outcome in self.outcomes)

    @property
    def output_tokens(self) -> int:
        """Output tokens of all requests, of those that failed later too."""
        return sum(len(outcome.token_times_s) for outcome in self.outcomes)

    @property
    def good_requests(self) -> int:
        """Requests that met all their SLOs."""
        return sum(o.meets(slo_ttft_s=self.slo_ttft_s, slo_tpot_s=self.slo_tpot_s) for o in self.outcomes)

    @property
    def good_share(self) -> float | None:
        """Their share of all requests; None for no requests."""
        return self.good_requests / len(self.outcomes) if self.outcomes else None

    def latencies(self) -> dict[str, list[float]]:
        """All values of each latency, in seconds, of the requests that succeeded."""
        done = [outcome for outcome in self.outcomes if not outcome.error]
        return {
            "ttft_s": [outcome.ttft_s for outcome in done if outcome.ttft_s is not None],
            "tpot_s": [outcome.tpot_s for outcome in done if outcome.tpot_s is not None],
            "itl_s": [gap for outcome in done for gap in outcome.itl_s],
            "end_to_end_s": [outcome.end_s - outcome.arrival_s for outcome in done],
        }

    def to_json(self) -> dict[str, Any]:
        """The summary and a line for each request."""
        duration_s = self.duration_s
        per_s = 1 / duration_s if duration_s > 0 else 0.0
        failures = Counter(outcome.error for outcome in self.outcomes if outcome.error)
        return {
            "requests": len(self.outcomes),
            "failures": dict(sorted(failures.items())),
            "recoveries": sum(outcome.recoveries for outcome in self.outcomes),
            "duration_s": round(duration_s, 6),
            "prompt_tokens": sum(outcome.prompt_tokens for outcome in self.outcomes),
            "output_tokens": self.output_tokens,
            "output_tokens_per_s": round(self.output_tokens * per_s, 3),
            "requests_per_s": round((len(self.outcomes) - failures.total()) * per_s, 4),
            "slo": {"ttft_s": self.slo_ttft_s, "tpot_s": self.slo_tpot_s},
            "good_requests": self.good_requests,
            "goodput_requests_per_s": round(self.good_requests * per_s, 4),
            **{name: _quantiles(values) for name, values in self.latencies().items()},
            "by_request": [_request_json(outcome) for outcome in self.outcomes],
        }


def report_table(report: Report) -> Table:
    """The summary for people, in milliseconds."""
    content = report.to_json()
    failed = sum(content["failures"].values())
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("", "p50", "p90", "p99"):
        table.add_column(heading, justify="right" if heading else "left")
    labels = {"ttft_s": "TTFT ms", "tpot_s": "TPOT ms", "itl_s": "ITL ms", "end_to_end_s": "end to end ms"}
    for name, label in labels.items():
        values = (content[name][quantile] for quantile in ("p50", "p90", "p99"))
        table.add_row(label, *("-" if value is None else f"{value * 1000:.1f}" for value in values))
    table.add_section()
    done = f"{len(report.outcomes) - failed} done"
    table.add_row("requests", done, f"{failed} failed", f"{content['requests_per_s']}/s")
    table.add_row("output tokens", str(report.output_tokens), "", f"{content['output_tokens_per_s']:.1f}/s")
    share = "" if report.good_share is None else f"{report.good_share:.0%}"
    table.add_row("goodput", f"{report.good_requests} good", share, f"{content['goodput_requests_per_s']}/s")
    if failed:
        table.add_row("failures", *(f"{code}: {count}" for code, count in list(content["failures"].items())[:3]))
    return table


def _quantiles(values: list[float]) -> dict[str, float | None]:
    """None for no values: JSON has no NaN."""
    named = {f"p{quantile * 100:g}": percentile(values, quantile) for quantile in QUANTILES}
    named["mean"] = math.fsum(values) / len(values) if values else math.nan
    return {name: None if math.isnan(value) else round(value, 6) for name, value in named.items()}


def _request_json(outcome: Outcome) -> dict[str, Any]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    return {
        "arrival_s": rounded(outcome.arrival_s),
        "ttft_s": rounded(outcome.ttft_s),
        "tpot_s": rounded(outcome.tpot_s),
        "end_to_end_s": rounded(outcome.end_s - outcome.arrival_s),
        "prompt_tokens": outcome.prompt_tokens,
        "output_tokens": len(outcome.token_times_s),
        "recoveries": outcome.recoveries,
        "finish_reason": outcome.finish_reason,
        "error": outcome.error,
    }
