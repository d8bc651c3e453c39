"""How well remaining lengths are predicted: `python -m benchmarks.predictor SAMPLES --prompts FILE`.

SAMPLES is a directory that `starmesh predictor collect` filled, FILE the prompts that it was given. All models are
fitted to the same folds over prompts, and every request is predicted by models that have not seen its prompt. Prints
JSON with, among others, ``mae`` by model, ``coverage_0_9``, ``parameters`` and ``us_per_prediction`` at batch 1 and 32.
``--docs FILE --plot FILE`` write the tables into FILE between its markers, and the plot.

``--explored N``: the first N requests stored were looked at while the models were designed. They teach, but neither
they nor others of their prompts are scored.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine
from benchmarks.predictor.cross_validation import Source, Task, run, together
from benchmarks.predictor.knowable import same_prompt
from benchmarks.predictor.tables import tables
from starmesh.prediction.batch import Floats, SampleBatch
from starmesh.prediction.dataset import Dataset, load_dataset
from starmesh.prediction.evaluation import PROGRESS_EDGES, REMAINING_EDGES, Estimate, HeldOut
from starmesh.prediction.kinds import KINDS, Depth
from starmesh.prediction.lengths import bin_edges
from starmesh.prediction.network import Dense, Network
from starmesh.prediction.training.models import MODELS, NEED_PROMPTS

PARTS = (0.25, 0.5)
CURVE = ("mlp", "starmesh")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def main() -> None:
    arguments = _arguments()
    source = Source(arguments.samples, arguments.prompts, arguments.folds, arguments.seed)
    base = load_dataset(source.directory, ())
    layers = base.manifest.layout.layers
    names = [name for name in MODELS if source.prompts or name not in NEED_PROMPTS]
    every = range(source.folds)
    tasks = [Task(name, fold) for name, fold in itertools.product(names, every)]
    # The learning curve and the choice of layers on two folds: enough to see, and half an hour less.
    some = range(min(2, source.folds))
    if not arguments.quick:
        tasks += [Task(name, fold, part=part) for name, part, fold in itertools.product(CURVE, PARTS, some)]
        tasks += [
            Task("starmesh", fold, layer=layer, averaged=averaged)
            for layer, averaged, fold in itertools.product(layers, (True, False), some)
        ]
    with _progress() as bar:
        found = run(source, tasks, processes=arguments.processes, bar=bar)
    limit = base.manifest.max_output_tokens or int(base.total_tokens.max())
    scored = _scored(base, arguments.explored)
    held_out = HeldOut(base, scored, limit_tokens=limit)
    predictions = {name: together(found[Task(name, fold)][0] for fold in every)[scored] for name in names}
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "commit": machine.commit("starmesh", "benchmarks"),
        "requests": len(base.request_ids),
        "samples": len(base),
        "scored_requests": len(np.unique(base.sequence[scored])),
        "scored_samples": len(scored),
        "model": base.manifest.model,
        "lengths": _lengths(base),
        "same_prompt": dataclasses.asdict(same_prompt(base)),
        "progress": [f"{low:.0%} to {high:.0%}" for low, high in itertools.pairwise(PROGRESS_EDGES)],
        "remaining": [_range(low, high) for low, high in itertools.pairwise(REMAINING_EDGES)],
        "models": {name: dataclasses.asdict(held_out.scores(values)) for name, values in predictions.items()},
        "parameters": {name: found[Task(name, 0)][1] for name in names},
        "ratios": _ratios(held_out, predictions),
        "us_per_prediction": {
            name: {str(batch): round(_microseconds(name, base, batch), 1) for batch in (1, 32)} for name in KINDS
        },
    }
    result["mae"] = {name: round(scores["mae"]["value"], 2) for name, scores in result["models"].items()}
    result["coverage_0_9"] = {name: round(scores["coverage"]["value"], 4) for name, scores in result["models"].items()}
    result["learning_curve"] = [] if arguments.quick else _curve(base, found, arguments.explored, limit, some)
    result["layers"] = [] if arguments.quick else _layers(base, found, arguments.explored, limit, some)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result))
    if arguments.docs:
        _write_between(arguments.docs, tables(result))
    if arguments.plot:
        from benchmarks.predictor.figures import draw

        draw(result, arguments.plot)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--prompts", type=Path, help="JSON Lines that the samples' prompts came from")
    parser.add_argument("--explored", type=int, default=0, help="requests stored first that are not scored")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="leave out the learning curve and the choice of layers")
    parser.add_argument("--json", type=Path, help="write the result there too")
    parser.add_argument("--docs", type=Path, help="write the tables into this file, between its markers")
    parser.add_argument("--plot", type=Path, help="write the plot there")
    return parser.parse_args()


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def _scored(dataset: Dataset, explored: int, rows: np.ndarray | None = None) -> np.ndarray:
    """The rows to score: of prompts that none of the first ``explored`` requests answered."""
    fresh = ~np.isin(dataset.prompt, dataset.prompt[:explored])
    wanted = fresh[dataset.sequence]
    if rows is not None:
        wanted = wanted & rows
    return np.flatnonzero(wanted)


def _ratios(held_out: HeldOut, predictions: dict[str, Floats]) -> dict[str, Any]:
    """MAE over another model's, overall and where over 400 tokens really remained, on the same resamples."""
    long = held_out.truth >= REMAINING_EDGES[-2]
    wanted = [("starmesh", name) for name in predictions if name != "starmesh"]
    wanted += [("mlp", name) for name in predictions if name.startswith(("prompt", "cond", "const"))]
    return {
        f"{ours}/{theirs}": {
            "all": dataclasses.asdict(held_out.ratio(predictions[ours], predictions[theirs])),
            "long": dataclasses.asdict(held_out.ratio(predictions[ours], predictions[theirs], long)),
            "finished": dataclasses.asdict(held_out.ratio(predictions[ours], predictions[theirs], held_out.finished)),
        }
        for ours, theirs in wanted
    }


def _part_mae(dataset: Dataset, values: Floats, explored: int, limit: int) -> Estimate:
    rows = _scored(dataset, explored, np.isfinite(values[:, 0]))
    held_out = HeldOut(dataset, rows, limit_tokens=limit)
    return held_out.mean(held_out.errors(values[rows]))


def _curve(
    dataset: Dataset, found: dict[Task, tuple[Floats, int]], explored: int, limit: int, some: range
) -> list[dict[str, Any]]:
    share = (1 - 1 / (max(task.fold for task in found) + 1)) * 7 / 8
    return [
        {
            "model": name,
            "requests": round(part * share * len(dataset.request_ids)),
            "mae": dataclasses.asdict(
                _part_mae(dataset, together(found[Task(name, fold, part=part)][0] for fold in some), explored, limit)
            ),
        }
        for name, part in itertools.product(CURVE, (*PARTS, 1.0))
    ]


def _layers(
    dataset: Dataset, found: dict[Task, tuple[Floats, int]], explored: int, limit: int, some: range
) -> list[dict[str, Any]]:
    rows = []
    for layer, averaged in itertools.product(dataset.manifest.layout.layers, (True, False)):
        values = together(found[Task("starmesh", fold, layer=layer, averaged=averaged)][0] for fold in some)
        mae = dataclasses.asdict(_part_mae(dataset, values, explored, limit))
        rows.append({"layer": layer, "averaged": averaged, "mae": mae})
    return rows


def _lengths(dataset: Dataset) -> dict[str, Any]:
    totals = dataset.total_tokens
    _, finished = dataset.lengths_of(np.arange(len(totals)))
    counts, edges = np.histogram(totals, bins=32)
    levels = (10, 25, 50, 75, 90)
    return {
        "mean": round(float(totals.mean()), 1),
        "quantiles": {str(level): int(np.percentile(totals, level)) for level in levels},
        "cut": round(float(1 - finished.mean()), 4),
        "cap": dataset.manifest.max_output_tokens,
        "counts": counts.tolist(),
        "edges": edges.round(1).tolist(),
    }


def _microseconds(name: str, dataset: Dataset, batch: int) -> float:
    """Median time of a forward over its samples, of a network of this kind with random weights."""
    kind = KINDS[name]
    width = 0 if kind.depth is Depth.NONE else dataset.manifest.layout.width
    edges = bin_edges(1024)
    rng = np.random.default_rng(0)
    widths = [width + (4 if kind.counts else 0), *kind.hidden, len(edges) - 1 if kind.outputs == "bins" else 1]
    dense = tuple(
        Dense(rng.normal(size=(after, before), scale=0.05).astype(np.float32), np.zeros(after, dtype=np.float32))
        for before, after in itertools.pairwise(widths)
    )
    ones = np.ones(widths[0], dtype=np.float32)
    layers = kind.depth.layers(max(dataset.manifest.layout.layers))
    layout = dataclasses.replace(dataset.manifest.layout, layers=layers)
    network = Network(kind, layout, 0 * ones, ones, dense, edges, 2.0)
    states = rng.normal(size=(batch, len(layers), dataset.manifest.layout.width)).astype(np.float16)
    counts = np.full(batch, 100)
    samples = SampleBatch(states, counts, counts, states.astype(np.float32))
    times = []
    for _ in range(60):
        started = time.perf_counter()
        network.predict(samples)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) / batch * 1e6


def _range(low: int, high: int) -> str:
    return f"{low} up" if high > 1 << 20 else f"{low} to {high - 1}"


def _write_between(path: Path, text: str) -> None:
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
