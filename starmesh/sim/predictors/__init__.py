"""Stand-ins for the predictor: they know each request's length and answer it with an error like a real one's.

Owns the error models and their choice by name. Owns no policy.
"""

from __future__ import annotations

from starmesh.sim.predictors.choice import PREDICTORS, make_predictor
from starmesh.sim.predictors.predictor import EVERY_TOKENS, ErrorModel, SimulatedPredictor

__all__ = ["EVERY_TOKENS", "PREDICTORS", "ErrorModel", "SimulatedPredictor", "make_predictor"]
