"""Draws the gaps of a result: `python -m benchmarks.migration.plot RESULT.json PLOT.svg`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

LINES = (
    # label, key in the result, backend, colour, format
    ("recompute", "recompute_ms", None, "tab:gray", "^-"),
    ("stop and copy, stream", "stop_and_copy_ms", "stream", "tab:red", "s-"),
    ("stop and copy, NIXL", "stop_and_copy_ms", "nixl", "tab:orange", "s-"),
    ("live migration, stream", "gap_ms", "stream", "tab:blue", "o-"),
    ("live migration, NIXL", "gap_ms", "nixl", "tab:green", "o-"),
    ("time between tokens, undisturbed", "itl_ms", None, "black", ":"),
)


def draw(result: dict[str, Any], path: Path) -> None:
    """Medians over resident tokens, with bars from the minimum to the 90th percentile."""
    # The same result gives the same file.
    mpl.rcParams.update({"svg.hashsalt": "starmesh", "font.size": 10, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    tokens = result["resident_tokens"]
    for label, key, backend, colour, form in LINES:
        found = result[key][backend] if backend else result[key]
        at = [tokens[length][0] for length in found]
        median, low, p90, _ = zip(*found.values(), strict=True)
        below = [middle - least for middle, least in zip(median, low, strict=True)]
        above = [most - middle for middle, most in zip(median, p90, strict=True)]
        bars = (below, above)
        axes.errorbar(at, median, bars, label=label, color=colour, fmt=form, capsize=2, linewidth=1.4, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("resident tokens")
    axes.set_ylabel("ms between two tokens at the client")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    source, target = sys.argv[1:]
    draw(json.loads(Path(source).read_text().splitlines()[-1]), Path(target))


if __name__ == "__main__":
    main()
