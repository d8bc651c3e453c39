"""The predictors that answer: of each kind the one that ships for the model, or its real shape with random weights."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np

from starmesh.cli.collection import hidden_sizes
from starmesh.model_files import model_revision
from starmesh.prediction.kinds import COUNT_INPUTS, KINDS, layers_of_kinds
from starmesh.prediction.lengths import bin_edges
from starmesh.prediction.network import Dense, Network
from starmesh.prediction.predictor_file import load_predictor, save_predictor, shipped_predictor
from starmesh.types import HiddenLayout

LONGEST_TOKENS = 1024


def sampled_layout(model: Path) -> HiddenLayout:
    """What the instances keep of each sample."""
    layers, width = hidden_sizes(model)
    return HiddenLayout(model_revision(model), layers_of_kinds(layers), width)


def provide(kind: str, model: Path, directory: Path) -> str:
    """Write a predictor of a kind to ``KIND.safetensors``. Returns where it comes from: "shipped" or "random"."""
    path = directory / f"{kind}.safetensors"
    shipped = shipped_predictor(model_revision(model))
    if shipped is not None and load_predictor(shipped).kind == kind:
        shutil.copyfile(shipped, path)
        return "shipped"
    save_predictor(_random(kind, model), path, trained={"weights": "random"}, half=True)
    return "random"


def _random(kind: str, model: Path) -> Network:
    description = KINDS[kind]
    model_layers, width = hidden_sizes(model)
    layers = description.depth.layers(model_layers)
    edges = bin_edges(LONGEST_TOKENS) if description.outputs == "bins" else np.zeros(0, dtype=np.int64)
    inputs = len(layers) * width + (COUNT_INPUTS if description.counts else 0)
    widths = [inputs, *description.hidden, len(edges) - 1 if len(edges) else 1]
    draw = np.random.default_rng(0)
    dense = tuple(
        Dense(
            (draw.normal(size=(after, before)) / np.sqrt(before)).astype(np.float32), np.zeros(after, dtype=np.float32)
        )
        for before, after in itertools.pairwise(widths)
    )
    return Network(
        description=description,
        layout=HiddenLayout(model_revision(model), layers, width),
        mean=np.zeros(inputs, dtype=np.float32),
        scale=np.ones(inputs, dtype=np.float32),
        dense=dense,
        edges=edges,
        upper_ratio=2.0,
    )
