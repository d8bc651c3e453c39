"""A trained network's forward, in numpy: from samples to quantiles of the remaining tokens.

Owns the weights in memory and the arithmetic; ``predictor_file`` reads and writes them, ``training`` makes them. Numpy
and not torch: a batch takes well under a millisecond, and the predictor service starts without torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from starmesh.prediction.batch import UPPER_QUANTILE, Floats, Integers, SampleBatch
from starmesh.prediction.kinds import Kind
from starmesh.prediction.lengths import quantiles
from starmesh.types import HiddenLayout

LEVELS = (0.5, UPPER_QUANTILE)


@dataclass(frozen=True, slots=True)
class Dense:
    """One layer: ``weight`` [outputs, inputs] and ``bias`` [outputs]."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class Network:
    """A trained predictor; implements ``batch.Predictor``.

    ``mean`` and ``scale`` [inputs] standardise its input. ``edges`` [bins + 1] are those of a kind that puts out bins;
    of one that puts out tokens ``upper_ratio`` is the 0.9 quantile of true over predicted tokens when it was trained.
    """

    description: Kind
    layout: HiddenLayout
    mean: Floats
    scale: Floats
    dense: tuple[Dense, ...]
    edges: Integers
    upper_ratio: float

    @property
    def kind(self) -> str:
        """The kind's name."""
        return self.description.name

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return sum(layer.weight.size + layer.bias.size for layer in self.dense)

    def predict(self, batch: SampleBatch) -> Floats:
        """[n, 2]: median and 0.9 quantile. Raises ValueError for hidden states of another shape than the layout's."""
        shape = (len(self.layout.layers), self.layout.width)
        if self.layout.layers and batch.hidden_states.shape[1:] != shape:
            raise ValueError(f"these hidden states are {batch.hidden_states.shape[1:]}, not {shape}")
        outputs = self.forward(self.description.inputs(batch))
        if self.description.outputs == "bins":
            probabilities = np.exp(outputs - outputs.max(axis=1, keepdims=True))
            return quantiles(probabilities, self.edges, LEVELS)
        median = np.maximum(outputs[:, :1], 0.0)
        return np.concatenate([median, median * np.float32(self.upper_ratio)], axis=1)

    def forward(self, inputs: Floats) -> Floats:
        """The outputs for [n, inputs]."""
        x: Floats = (inputs - self.mean) / self.scale
        for layer in self.dense[:-1]:
            x = x @ layer.weight.T + layer.bias
            x = np.maximum(x, np.float32(0)) if self.description.activation == "relu" else _silu(x)
        result: Floats = x @ self.dense[-1].weight.T + self.dense[-1].bias
        return result


def _silu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp of what is far below 0 is infinite, and the quotient 0 as it should be
        result: Floats = x / (1 + np.exp(-x))
    return result
