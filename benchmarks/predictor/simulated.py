"""The predictor's error as the simulator draws it: `python -m benchmarks.predictor.simulated SAMPLES --out FILE`.

SAMPLES is a directory that `starmesh predictor collect` filled. Every request is predicted by a `starmesh` predictor
fitted without its prompt, and FILE (starmesh/sim/predictors/measured.json) gets what those held-out predictions were
given the truth: quantiles of the median by the request's length and by what remained, the upper quantile's distance
from it, how errors persist along a request, and the errors and coverage that came out, which a test holds the simulated
predictor to. All lengths are parts of the collection's cap.

Requests that were looked at while the predictor was designed are in: that changed its error less than leaving two
thirds of the requests out of the tables would.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path
from statistics import NormalDist
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from benchmarks import machine
from benchmarks.predictor.cross_validation import Source, Task, run, together
from starmesh.prediction.dataset import Dataset, load_dataset
from starmesh.prediction.evaluation import PROGRESS_EDGES, HeldOut
from starmesh.sim.predictors.noise import correlation

Numbers = npt.NDArray[np.float64]

LEVELS = (0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
# Parts of the cap. The last length is that of requests that were cut. The finest remaining part is one sample's.
LENGTH_EDGES = (0.0, 0.08, 0.16, 0.24, 0.36, 0.6, 0.9999, 2.0)
REMAINING_EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 2.0)
MEDIAN_EDGES = (0.0, 0.03, 0.06, 0.12, 0.22, 0.45, 0.7, 2.0)
GENERATED_EDGES = (0.0, 0.0001, 0.1, 0.3, 0.6, 2.0)
FEWEST_SAMPLES = 20
LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SLOW_KNOTS = (2, 3, 4, 5, 6, 8, 10, 12)
LENGTH_LEVELS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    source = Source(arguments.samples, None, arguments.folds, arguments.seed)
    dataset = load_dataset(source.directory, ())
    tasks = [Task("starmesh", fold) for fold in range(source.folds)]
    with Progress(console=Console(stderr=True)) as bar:
        found = run(source, tasks, processes=arguments.processes, bar=bar)
    predictions = together(found[task][0] for task in tasks).astype(np.float64)
    result = {"provenance": _provenance(dataset, source), **_errors(dataset, predictions)}
    arguments.out.write_text(json.dumps(_rounded(result), separators=(", ", ": ")).replace(', "', ',\n"') + "\n")
    print(json.dumps(result["measured"], indent=1))


def _provenance(dataset: Dataset, source: Source) -> dict[str, Any]:
    return {
        "model": dataset.manifest.model,
        "predictor": "starmesh",
        "requests": len(dataset.request_ids),
        "samples": len(dataset),
        "cap_tokens": dataset.manifest.max_output_tokens,
        "every_tokens": dataset.manifest.every_tokens,
        "command": f"python -m benchmarks.predictor.simulated SAMPLES --folds {source.folds} --seed {source.seed}",
        "commit": machine.commit("starmesh/prediction", "benchmarks/predictor"),
    }


def _errors(dataset: Dataset, predictions: Numbers) -> dict[str, Any]:
    cap = dataset.manifest.max_output_tokens
    generated = dataset.output_tokens / cap
    remaining = dataset.remaining_tokens / cap
    median = predictions[:, 0] / cap
    beyond = np.log(predictions[:, 1] / predictions[:, 0])
    lengths = generated + remaining
    medians = _Cells(lengths, LENGTH_EDGES, remaining, REMAINING_EDGES)
    uppers = _Cells(median, MEDIAN_EDGES, generated, GENERATED_EDGES)
    every = dataset.manifest.every_tokens / cap
    knots, persistence = _persistence(
        dataset, {"median": medians.normal_scores(median), "upper": uppers.normal_scores(beyond)}
    )
    return {
        "levels": LEVELS,
        "median": {"length": medians.rows, "remaining": medians.columns, "values": medians.quantiles(median)},
        "upper": {"median": uppers.rows, "generated": uppers.columns, "values": uppers.quantiles(beyond)},
        "slow_knots": knots * every,
        "fast_knots": every,
        "persistence": persistence,
        "measured": _measured(dataset, predictions),
    }


class _Cells:
    """Samples by two things; ``rows`` and ``columns`` are where the bins are in the mean (of logarithms)."""

    def __init__(self, rows: Numbers, row_edges: tuple[float, ...], columns: Numbers, column_edges: tuple[float, ...]):
        row, column = np.digitize(rows, row_edges) - 1, np.digitize(columns, column_edges) - 1
        self._shape = (len(row_edges) - 1, len(column_edges) - 1)
        self._cell = row * self._shape[1] + column
        self.rows = [_middle(rows[row == index]) for index in range(self._shape[0])]
        self.columns = [_middle(columns[column == index]) for index in range(self._shape[1])]

    def quantiles(self, values: Numbers) -> list[list[list[float]]]:
        """At LEVELS, [rows, columns, levels]; cells with too few samples like the nearest column of the same row."""
        table = []
        for row in range(self._shape[0]):
            groups = [values[self._cell == row * self._shape[1] + column] for column in range(self._shape[1])]
            known = [column for column, group in enumerate(groups) if len(group) >= FEWEST_SAMPLES]
            nearest = [min(known, key=lambda at: (abs(at - column), at)) for column in range(self._shape[1])]
            table.append([np.quantile(groups[column], LEVELS).tolist() for column in nearest])
        return table

    def normal_scores(self, values: Numbers) -> Numbers:
        """Each value's place among those of its cell, as a normal number."""
        scores = np.zeros(len(values))
        normal = NormalDist()
        for cell in np.unique(self._cell):
            members = np.flatnonzero(self._cell == cell)
            places = (values[members].argsort().argsort() + 0.5) / len(members)
            scores[members] = [normal.inv_cdf(place) for place in places]
        return scores


def _middle(values: Numbers) -> float:
    return float(np.exp(np.log(values).mean())) if values.min() > 0 else float(values.mean())


def _persistence(dataset: Dataset, scores: dict[str, Numbers]) -> tuple[int, dict[str, dict[str, float]]]:
    """The samples between slow knots, and the parts of the variance, that come nearest to the correlations found."""
    found = {}
    for name, values in scores.items():
        rows = []
        for lag in LAGS:
            pairs = np.flatnonzero(dataset.sequence[:-lag] == dataset.sequence[lag:])
            first, second = values[pairs], values[pairs + lag]
            rows.append((first * second).mean() / np.sqrt((first**2).mean() * (second**2).mean()))
        found[name] = np.array(rows)
    tenths = np.arange(0.0, 1.001, 0.02)
    grid = np.array([(a, b, 1 - a - b) for a, b in itertools.product(tenths, tenths) if a + b <= 1.0001]).clip(0)
    best: tuple[float, int, dict[str, dict[str, float]]] | None = None
    for knots in SLOW_KNOTS:
        lags = np.array(LAGS, dtype=np.float64)
        parts = np.stack((np.ones(len(LAGS)), correlation(lags / knots), correlation(lags, held=True)))
        misses = {name: ((grid @ parts - wanted) ** 2).sum(axis=1) for name, wanted in found.items()}
        total = float(sum(miss.min() for miss in misses.values()))
        if best is None or total < best[0]:
            picked = {name: grid[int(miss.argmin())] for name, miss in misses.items()}
            best = (
                total,
                knots,
                {
                    name: dict(zip(("request", "slow", "fast"), map(float, one), strict=True))
                    for name, one in picked.items()
                },
            )
    assert best is not None
    return best[1], best[2]


def _measured(dataset: Dataset, predictions: Numbers) -> dict[str, Any]:
    """What a simulation of the same requests should find, in tokens, and their lengths."""
    held_out = HeldOut(dataset, np.arange(len(dataset)), limit_tokens=dataset.manifest.max_output_tokens)
    scores = held_out.scores(predictions.astype(np.float32))
    levels = np.linspace(0.0, 1.0, LENGTH_LEVELS + 1)
    return {
        "lengths": np.quantile(dataset.total_tokens, levels).tolist(),
        "progress": PROGRESS_EDGES,
        "mae": scores.mae.value,
        "mae_by_progress": [part.value for part in scores.by_progress],
        "coverage": scores.coverage.value,
        "coverage_by_progress": [part.value for part in scores.coverage_by_progress],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    main()
