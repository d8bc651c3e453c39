"""The simulated predictors by name."""

from __future__ import annotations

from typing import Final

from starmesh.sim.predictors.measured import MeasuredPredictor
from starmesh.sim.predictors.oracle import Oracle
from starmesh.sim.predictors.paper import PaperPredictor
from starmesh.sim.predictors.predictor import SimulatedPredictor
from starmesh.sim.workload import WorkloadError

PREDICTORS: Final = ("none", "measured", "paper", "oracle")
"""Without predictions, with those of our trained predictor, with such as the paper reports, with exact ones."""


def make_predictor(name: str, *, seed: int, cap_tokens: int) -> SimulatedPredictor | None:
    """The predictor of that name; None for "none".

    ``cap_tokens``: how long the workload's outputs get, which errors are relative to (``output_cap``). Raises
    WorkloadError for an unknown name.
    """
    match name:
        case "none":
            return None
        case "measured":
            return SimulatedPredictor(MeasuredPredictor(seed=seed, cap_tokens=cap_tokens))
        case "paper":
            return SimulatedPredictor(PaperPredictor(seed=seed, cap_tokens=cap_tokens))
        case "oracle":
            return SimulatedPredictor(Oracle())
        case _:
            raise WorkloadError(f"predictors are {', '.join(PREDICTORS)}, not {name!r}")
