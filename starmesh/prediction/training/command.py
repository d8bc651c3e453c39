"""``starmesh predictor train`` and ``evaluate``: from a directory of samples to a file, and from both to a table."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from starmesh.prediction.batch import Floats
from starmesh.prediction.dataset import Dataset, Split, load_dataset, split
from starmesh.prediction.evaluation import PROGRESS_EDGES, HeldOut, Scores
from starmesh.prediction.kinds import KINDS
from starmesh.prediction.network import Network
from starmesh.prediction.predictor_file import load_predictor, predictor_version, read_trained, save_predictor
from starmesh.prediction.shards import read_manifest
from starmesh.prediction.training import references
from starmesh.prediction.training.fit import config_for, fit


def train(
    console: Console,
    *,
    directory: Path,
    kind: str,
    out: Path | None,
    seed: int,
    device: str,
    epochs: int,
    layer: int | None = None,
    final: bool = False,
) -> Path:
    """Train a predictor of ``kind`` and write it to ``out`` (default: named after model and kind, in the working
    directory). It looks at ``layer``, or at that of its kind in a model whose last layer is the last collected. Prints
    how it does on requests that it has not seen; with ``final`` it learns from these too, and there is nothing to show.
    Raises ShardError, and ValueError for an unknown kind or a device that
    is not there."""
    if kind not in KINDS:
        raise ValueError(f"no kind of predictor is named {kind!r}; there are {', '.join(KINDS)}")
    manifest = read_manifest(directory)
    chosen = KINDS[kind].depth.layers(max(manifest.layout.layers)) if layer is None else (layer,)
    dataset = load_dataset(directory, chosen)
    parts = split(dataset, seed=seed)
    if final:
        nobody = parts.test[:0]
        parts = Split(np.sort(np.concatenate([parts.train, parts.test])), parts.validation, nobody)
    config = config_for(KINDS[kind], seed=seed, device=device, epochs=epochs)
    console.print(
        f"{len(dataset.request_ids):,} requests, {len(dataset):,} samples of {manifest.model}; "
        f"{len(parts.train):,} to learn from, {len(parts.validation):,} to stop by, {len(parts.test):,} held out"
    )
    with Progress(
        TextColumn("epoch"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("", total=config.epochs, losses="")
        fitted = fit(
            dataset,
            parts,
            KINDS[kind],
            config,
            on_epoch=lambda at: bar.update(
                task, completed=at.epoch, losses=f"validation loss {at.loss:.4f}, best {at.best_loss:.4f}"
            ),
        )
    path = out or Path(f"{manifest.model.replace('/', '-')}-{kind}.safetensors")
    save_predictor(
        fitted.network,
        path,
        trained={
            "requests": len(parts.train),
            "samples": len(dataset.rows_of(parts.train)),
            "epoch": fitted.epoch,
            "seed": seed,
            "final": final,
            "model": manifest.model,
            "every_tokens": manifest.every_tokens,
            "sampling": manifest.sampling,
            "max_output_tokens": manifest.max_output_tokens,
        },
        half=True,
    )
    if not final:
        _show(console, dataset, parts, {predictor_version(path): load_predictor(path)})
    console.print(f"wrote {path}; to serve it: starmesh up --predictor {path}")
    return path


def evaluate(console: Console, *, directory: Path, predictor: Path, seed: int) -> None:
    """Score a predictor on the requests that ``train`` with the same seed holds out. Raises ShardError, and
    PredictorFileError for a file that is none; ValueError when it is for another model than the samples."""
    network = load_predictor(predictor)
    manifest = read_manifest(directory)
    if network.layout.model_revision != manifest.layout.model_revision:
        raise ValueError(
            f"{predictor} is for model revision {network.layout.model_revision}, and {directory} holds samples of "
            f"{manifest.layout.model_revision}: train one with `starmesh predictor train {directory}`"
        )
    dataset = load_dataset(directory, network.layout.layers)
    parts = split(dataset, seed=seed)
    trained = read_trained(predictor)
    if trained.get("final") or trained.get("seed") != seed:
        console.print(f"{predictor} may have learned from some of these requests: it does worse on others")
    _show(console, dataset, parts, {predictor_version(predictor): network})


def _show(console: Console, dataset: Dataset, parts: Split, networks: dict[str, Network]) -> None:
    rows = dataset.rows_of(parts.test)
    if not len(rows):
        console.print("too few requests to hold any out")
        return
    limit = dataset.manifest.max_output_tokens or int(dataset.total_tokens.max())
    held_out = HeldOut(dataset, rows, limit_tokens=limit)
    predictions: dict[str, Floats] = {
        "constant": references.constant(dataset, parts)(rows),
        "conditional_median": references.conditional(dataset, parts)(rows),
    }
    predictions |= {name: network.predict(dataset.batch(rows)) for name, network in networks.items()}
    console.print(
        scores_table({name: held_out.scores(values) for name, values in predictions.items()}, len(parts.test))
    )


def scores_table(scores: dict[str, Scores], requests: int) -> Table:
    """Models one below the other: errors overall and by progress, coverage."""
    some = next(iter(scores.values()))
    table = Table(title=f"mean absolute error in tokens, {requests:,} requests held out, {some.samples:,} samples")
    table.add_column("model")
    table.add_column("all", justify="right")
    table.add_column("95 % interval", justify="right")
    for low, high in itertools.pairwise(PROGRESS_EDGES):
        table.add_column(f"{low:.0%} to {high:.0%}", justify="right")
    table.add_column("within the 0.9 quantile", justify="right")
    for name, score in scores.items():
        table.add_row(
            name,
            f"{score.mae.value:.1f}",
            f"{score.mae.low:.1f} to {score.mae.high:.1f}",
            *(f"{quarter.value:.1f}" for quarter in score.by_progress),
            "" if np.isnan(score.coverage.value) else f"{score.coverage.value:.1%}",
        )
    return table
