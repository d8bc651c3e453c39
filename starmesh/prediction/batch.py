"""Samples in columns, and the port of everything that predicts from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from starmesh.types import HiddenLayout

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

UPPER_QUANTILE = 0.9
"""The quantile that memory is planned by: of ten sequences nine stay within. The paper has none; it is our choice."""


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """n samples. ``hidden_states`` is [n, layers, width] float16, ``averaged_states`` the same averaged over the
    sequence's samples so far (``averaging``), None where each is its sequence's first; ``prompt_tokens`` and
    ``output_tokens`` are [n]."""

    hidden_states: npt.NDArray[np.float16]
    prompt_tokens: Integers
    output_tokens: Integers
    averaged_states: Floats | None = None

    def __post_init__(self) -> None:
        if self.hidden_states.ndim != 3 or not (
            len(self.hidden_states) == len(self.prompt_tokens) == len(self.output_tokens)
        ):
            raise ValueError(
                f"a batch needs as many hidden states [layers, width] as counts, not {self.hidden_states.shape}, "
                f"{self.prompt_tokens.shape} and {self.output_tokens.shape}"
            )

    def __len__(self) -> int:
        return len(self.prompt_tokens)


class Predictor(Protocol):
    """Predicts remaining tokens. May be called from any one thread at a time."""

    @property
    def kind(self) -> str:
        """The kind of model, a name of the registry."""
        ...

    @property
    def layout(self) -> HiddenLayout | None:
        """The samples that it takes: those of this model, with just these layers. None for one that takes any."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers were learned."""
        ...

    def predict(self, batch: SampleBatch) -> Floats:
        """[n, 2]: the median and the 0.9 quantile of the tokens still to come, at least 0, the second not below the
        first. Raises ValueError for hidden states of another shape than ``layout`` says."""
        ...
