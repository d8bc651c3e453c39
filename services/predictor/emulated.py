"""Predictors of an emulated cluster: they know each output's length, and answer with the errors of a real one.

Owns the way from samples to ``starmesh.sim.predictors``, whose error models these are: so the same predictor can be
tried live and simulated.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from starmesh.emulation.emulation import Emulation
from starmesh.emulation.hidden_states import hidden_layout, read_lengths
from starmesh.prediction.batch import Floats, SampleBatch
from starmesh.sim.predictors import PREDICTORS, SimulatedPredictor, make_predictor
from starmesh.types import HiddenLayout


class EmulatedPredictor:
    """Implements ``Predictor`` for the hidden states of emulated engines."""

    parameters = 0

    def __init__(self, kind: str, predictor: SimulatedPredictor, layout: HiddenLayout) -> None:
        self.kind = kind
        self.layout: HiddenLayout | None = layout
        self._predictor = predictor

    def predict(self, batch: SampleBatch) -> Floats:
        """As ``Predictor.predict``."""
        known = read_lengths(batch.hidden_states)
        median, upper, _ = self._predictor.remaining(
            known.keys, batch.output_tokens, known.output_tokens, np.maximum(known.limits, known.output_tokens)
        )
        return np.stack([median, upper], axis=1).astype(np.float32)


def emulated_predictors(emulation: Emulation, *, cap_tokens: int) -> Mapping[str, EmulatedPredictor]:
    """All of them by name; errors are relative to ``cap_tokens``, the longest output of the workload."""
    layout = hidden_layout(emulation.layout)
    made = {name: make_predictor(name, seed=0, cap_tokens=cap_tokens) for name in PREDICTORS}
    return {name: EmulatedPredictor(name, found, layout) for name, found in made.items() if found is not None}
