"""Lengths of prompts and outputs drawn by seed, from the length models that ``starmesh.lengths`` has."""

from __future__ import annotations

from starmesh.lengths import LENGTH_MODELS, Lengths
from starmesh.sim.workload.streams import stream


class LengthDraws:
    """Draws (prompt tokens, output tokens) of ``model``, as often as asked. Raises KeyError for an unknown one."""

    def __init__(self, model: str, *, seed: int) -> None:
        self._model = LENGTH_MODELS[model]
        self._prompts = stream(seed, f"{model} prompts")
        self._outputs = stream(seed, f"{model} outputs")

    def draw(self, count: int) -> tuple[Lengths, Lengths]:
        """The next ``count`` of both."""
        return self._model.prompts.draw(self._prompts, count), self._model.outputs.draw(self._outputs, count)
