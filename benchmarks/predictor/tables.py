"""The tables of ``docs/predictor.md``, from a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tables(result: dict[str, Any]) -> str:
    """Markdown."""
    lengths, same = result["lengths"], result["same_prompt"]
    quantiles = " / ".join(str(value) for value in lengths["quantiles"].values())
    parts = [
        f"{result['requests']:,} requests of {result['model']}, {result['samples']:,} samples. Output lengths: mean "
        f"{lengths['mean']:.0f}, p10 / 25 / 50 / 75 / 90 {quantiles}, {lengths['cut']:.1%} cut at {lengths['cap']}. "
        f"Scored: {result['scored_requests']:,} requests, {result['scored_samples']:,} samples. Machine: "
        f"{result['machine']}. Commit {result['commit']}.",
        _heading("Error and calibration, all models"),
        _table(
            [
                "model",
                "MAE, tokens",
                "MAE, requests not cut",
                "within the 0.9 quantile",
                "below the median",
                "parameters",
            ],
            [
                [
                    f"`{name}`",
                    _with_interval(scores["mae"]),
                    _with_interval(scores["mae_finished"]),
                    _percent(scores["coverage"]),
                    _percent(scores["below_median"]),
                    f"{result['parameters'][name]:,}",
                ]
                for name, scores in result["models"].items()
            ],
        ),
        _heading("MAE by how much of the output is generated"),
        _by(result, "progress", "by_progress"),
        _heading("MAE by what really remained"),
        _by(result, "remaining", "by_remaining"),
        _heading("MAE over another's (below 1 is better), on the same resamples"),
        _table(
            ["models", "all samples", "over 400 tokens to come", "requests not cut"],
            [
                [f"`{pair}`", *(_ratio(row[where]) for where in ("all", "long", "finished"))]
                for pair, row in result["ratios"].items()
            ],
        ),
        _heading("Coverage of the 0.9 quantile by progress"),
        _table(
            ["model", *result["progress"]],
            [
                [f"`{name}`", *(f"{part['value']:.1%}" for part in result["models"][name]["coverage_by_progress"])]
                for name in ("conditional_median", "mlp", "starmesh")
            ],
        ),
        _heading("What cannot be known from the prompt"),
        f"Two answers to the same prompt ({same['prompts']:,} prompts with more than one) differ by "
        f"{same['difference']:.0f} tokens in the mean, two answers to any of these prompts by "
        f"{same['difference_of_any']:.0f}. No prediction of the length from the prompt alone can err by less than half "
        f"of the former, {same['difference'] / 2:.0f} tokens.",
        _heading("Time per prediction (numpy, one thread), microseconds"),
        _table(
            ["kind", "batch 1", "batch 32"],
            [[f"`{kind}`", f"{row['1']:.0f}", f"{row['32']:.1f}"] for kind, row in result["us_per_prediction"].items()],
        ),
    ]
    if result["learning_curve"]:
        parts += [
            _heading("Learning curve (two folds)"),
            _table(
                ["model", "requests to learn from", "MAE, tokens"],
                [
                    [f"`{row['model']}`", f"{row['requests']:,}", _with_interval(row["mae"])]
                    for row in result["learning_curve"]
                ],
            ),
            _heading("Layers, for `starmesh` (two folds)"),
            _table(
                ["layer", "averaged over the samples so far", "newest sample alone"],
                _layers(result["layers"]),
            ),
        ]
    return "\n\n".join(parts)


def _by(result: dict[str, Any], places: str, key: str) -> str:
    return _table(
        ["model", *result[places]],
        [[f"`{name}`", *(f"{part['value']:.0f}" for part in scores[key])] for name, scores in result["models"].items()],
    )


def _layers(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    layers = sorted({row["layer"] for row in rows})
    found = {(row["layer"], row["averaged"]): _with_interval(row["mae"]) for row in rows}
    return [[str(layer), found[layer, True], found[layer, False]] for layer in layers]


def _with_interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]"


def _ratio(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _percent(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.1%} [{estimate['low']:.1%}, {estimate['high']:.1%}]"


def _heading(text: str) -> str:
    return f"**{text}**"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
