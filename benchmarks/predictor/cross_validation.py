"""Held-out predictions of every sample by every model: each fold's models predict what they have not seen."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from rich.progress import Progress

from starmesh.model_files import fetch_model
from starmesh.prediction.batch import Floats
from starmesh.prediction.dataset import Dataset, Split, folds, load_dataset
from starmesh.prediction.kinds import KINDS, Depth, Kind
from starmesh.prediction.shards import read_manifest
from starmesh.tokenizer import ModelTokenizer


@dataclass(frozen=True, slots=True)
class Task:
    """One model of one fold. ``model`` names a model of the registry, or is a kind to try instead, which looks at
    ``layer``; ``part`` of the training requests are used."""

    model: str
    fold: int
    layer: int | None = None
    averaged: bool = True
    part: float = 1.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where the samples are, and the prompts that they came from (for the model of bags of tokens)."""

    directory: Path
    prompts: Path | None
    folds: int
    seed: int


def run(source: Source, tasks: Iterable[Task], *, processes: int, bar: Progress) -> dict[Task, tuple[Floats, int]]:
    """Each task's predictions [n, 2], NaN for rows that its fold does not hold out, and the model's parameters."""
    listed = list(tasks)
    shown = bar.add_task("models fitted", total=len(listed))
    quiet = not bar.console.is_terminal
    found = {}
    with ProcessPoolExecutor(processes, initializer=_one_thread) as pool:
        # The long ones first, so that none is left over alone at the end.
        order = sorted(listed, key=lambda task: not task.model.startswith("mlp"))
        futures = {pool.submit(_fit, source, task): task for task in order}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            bar.advance(shown)
            if quiet:
                bar.console.print(f"{len(found)} of {len(listed)} models fitted: {futures[future]}")
    return found


def together(results: Iterable[Floats]) -> Floats:
    """The folds' predictions in one array."""
    merged: Floats = np.fmax.reduce(list(results))
    return merged


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@cache
def _dataset(directory: Path, layers: tuple[int, ...]) -> Dataset:
    return load_dataset(directory, layers)


@cache
def _prompts(path: Path) -> list[list[int]]:
    from starmesh.cli.bench import read_prompts

    tokenizer = ModelTokenizer.load(fetch_model("SmolLM2-135M-Instruct"))
    return [tokenizer.encode(prompt) for prompt in read_prompts(str(path))]


def _split(dataset: Dataset, source: Source, task: Task) -> Split:
    found = list(folds(dataset, source.folds, seed=source.seed))[task.fold]
    if task.part == 1.0:
        return found
    kept = np.random.default_rng(task.fold).permutation(found.train)[: round(task.part * len(found.train))]
    return replace(found, train=np.sort(kept))


def _fit(source: Source, task: Task) -> tuple[Floats, int]:
    from starmesh.prediction.training.fit import config_for, fit
    from starmesh.prediction.training.models import MODELS, Material

    if task.layer is not None:
        dataset = _dataset(source.directory, (task.layer,))
        split = _split(dataset, source, task)
        kind: Kind = replace(KINDS["starmesh"], averaged=task.averaged)
        network = fit(dataset, split, kind, config_for(kind)).network
        rows = dataset.rows_of(split.test)
        return _spread(dataset, rows, network.predict(dataset.batch(rows))), network.parameters
    layers = max(read_manifest(source.directory).layout.layers)
    wanted = {depth.layers(layers) for depth in (Depth.TWO_THIRDS, Depth.LAST)}
    material = Material(
        {layers: _dataset(source.directory, layers) for layers in sorted(wanted)},
        prompts=_prompts(source.prompts) if "bag" in task.model and source.prompts else (),
    )
    dataset = material.dataset(())
    split = _split(dataset, source, task)
    model = MODELS[task.model](material, split)
    rows = dataset.rows_of(split.test)
    return _spread(dataset, rows, model.predict(rows)), model.parameters


def _spread(dataset: Dataset, rows: np.ndarray, predictions: Floats) -> Floats:
    spread = np.full((len(dataset), 2), np.nan, dtype=np.float32)
    spread[rows] = predictions
    return spread
