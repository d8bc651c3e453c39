"""How long prompts and outputs are: the length models by name, for simulated and for emulated clusters.

Owns the models and where their numbers come from. Prompt and output of a request are drawn apart from each other: in
the trace behind "chat" their rank correlation is 0.07. Cutting at a cap is the caller's, and so is chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.float64]


class Distribution(Protocol):
    """A distribution of lengths in tokens."""

    def draw(self, draw: np.random.Generator, count: int) -> Lengths:
        """``count`` lengths above 0, not yet whole."""
        ...


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Given by (part of the requests that are shorter, tokens) pairs from 0 to 1, log-uniform between them. Two pairs
    with the same tokens hold a mass there."""

    points: tuple[tuple[float, float], ...]

    def draw(self, draw: np.random.Generator, count: int) -> Lengths:
        """By inversion: the n-th draw falls in the same place of any such distribution."""
        return self.at(draw.random(count))

    def at(self, parts: Lengths) -> Lengths:
        """[n] lengths that ``parts`` [n] of the requests, from 0 to 1, do not exceed."""
        known, tokens = np.array(self.points).T
        lengths: Lengths = np.exp(np.interp(parts, known, np.log(tokens)))
        return lengths


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Of this mean in tokens; ``sigma`` is the standard deviation of the logarithm."""

    mean: float
    sigma: float

    def draw(self, draw: np.random.Generator, count: int) -> Lengths:
        """Independent of each other."""
        return draw.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)


@dataclass(frozen=True, slots=True)
class LengthModel:
    """Lengths of prompts and of outputs. Outputs are made for a cap of ``cap_tokens``."""

    prompts: Distribution
    outputs: Quantiles
    cap_tokens: int


LENGTH_MODELS: Final[Mapping[str, LengthModel]] = MappingProxyType(
    {
        # Outputs: the paper says 29.2 % below 1K, 17.3 % above 30K and a cap of 32K. All else is our choice:
        # log-uniform between its two points, 1 % above 30K that end by themselves, 16.3 % that the cap cuts (a
        # reasoning model that got that far is mostly in a loop), and the shortest 32 tokens. Prompts: ShareGPT's mean
        # as the vLLM paper has it (Kwon et al., SOSP'23, figure 11); the log-normal and its width are our choice.
        "reasoning": LengthModel(
            prompts=LogNormal(mean=161.31, sigma=1.1),
            outputs=Quantiles(
                ((0.0, 32.0), (0.05, 192.0), (0.292, 1024.0), (0.827, 30_720.0), (0.837, 32_768.0), (1.0, 32_768.0))
            ),
            cap_tokens=32_768,
        ),
        # Quantiles of the 19,366 requests of Azure's conversation trace of 2023 (Azure/AzurePublicDataset, CC-BY 4.0;
        # Patel et al., "Splitwise", ISCA'24).
        "chat": LengthModel(
            prompts=Quantiles(
                (
                    (0.0, 2.0),
                    (0.001, 8.0),
                    (0.01, 29.0),
                    (0.025, 120.0),
                    (0.05, 181.0),
                    (0.1, 207.0),
                    (0.25, 396.0),
                    (0.5, 1020.0),
                    (0.75, 1189.0),
                    (0.9, 2734.0),
                    (0.95, 4083.0),
                    (0.99, 4142.0),
                    (0.999, 6179.0),
                    (1.0, 14_050.0),
                )
            ),
            outputs=Quantiles(
                (
                    (0.0, 7.0),
                    (0.001, 12.0),
                    (0.01, 16.0),
                    (0.025, 28.0),
                    (0.05, 41.0),
                    (0.1, 54.0),
                    (0.25, 85.0),
                    (0.5, 129.0),
                    (0.75, 395.0),
                    (0.9, 424.0),
                    (0.95, 451.0),
                    (0.99, 601.0),
                    (0.999, 954.0),
                    (1.0, 1000.0),
                )
            ),
            cap_tokens=1000,
        ),
    }
)
