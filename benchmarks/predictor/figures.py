"""Plots of a result: errors by progress, calibration, the learning curve and the distribution of lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

COLOURS = {
    "constant": "tab:gray",
    "conditional_median": "black",
    "prompt_state_given_elapsed": "tab:orange",
    "mlp": "tab:red",
    "starmesh": "tab:blue",
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Four panels into one SVG; the same result gives the same file."""
    mpl.rcParams.update({"svg.hashsalt": "starmesh", "font.size": 9, "svg.fonttype": "none"})
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 6.4), layout="constrained")
    _lengths(axes[0][0], result["lengths"])
    _by_progress(axes[0][1], result)
    _by_remaining(axes[1][0], result)
    _curve(axes[1][1], result)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _lengths(axes: Any, lengths: dict[str, Any]) -> None:
    axes.stairs(lengths["counts"], lengths["edges"], fill=True, color="tab:blue", alpha=0.6)
    axes.set(xlabel="output tokens", ylabel="requests", title=f"lengths ({lengths['cut']:.1%} cut)")


def _by_progress(axes: Any, result: dict[str, Any]) -> None:
    places = range(len(result["progress"]))
    for name, colour in COLOURS.items():
        rows = result["models"][name]["by_progress"]
        values = [row["value"] for row in rows]
        errors = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
        axes.errorbar(places, values, yerr=errors, color=colour, marker="o", markersize=3, capsize=2, label=name)
    axes.set_xticks(places, result["progress"], fontsize=7)
    axes.set(xlabel="part of the output generated", ylabel="MAE, tokens", title="error by progress", ylim=0)
    axes.legend(fontsize=7)


def _by_remaining(axes: Any, result: dict[str, Any]) -> None:
    places = range(len(result["remaining"]))
    for name, colour in COLOURS.items():
        rows = result["models"][name]["by_remaining"]
        axes.plot(places, [row["value"] for row in rows], color=colour, marker="o", markersize=3, label=name)
    axes.set_xticks(places, result["remaining"], fontsize=6)
    axes.set(xlabel="tokens that really remained", ylabel="MAE, tokens", title="error by what remained", ylim=0)


def _curve(axes: Any, result: dict[str, Any]) -> None:
    for name in ("mlp", "starmesh"):
        points = [point for point in result["learning_curve"] if point["model"] == name]
        axes.errorbar(
            [point["requests"] for point in points],
            [point["mae"]["value"] for point in points],
            yerr=[
                [point["mae"]["value"] - point["mae"]["low"] for point in points],
                [point["mae"]["high"] - point["mae"]["value"] for point in points],
            ],
            color=COLOURS[name],
            marker="o",
            markersize=3,
            capsize=2,
            label=name,
        )
    axes.axhline(
        result["models"]["conditional_median"]["mae"]["value"], color="black", linestyle=":", label="conditional_median"
    )
    axes.set(xlabel="requests to learn from", ylabel="MAE, tokens", title="learning curve", ylim=0)
    axes.legend(fontsize=7)
