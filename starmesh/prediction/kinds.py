"""The kinds of trained predictors: what each looks at, how large its network is, and what its outputs mean.

Owns the registry and how samples become a network's input. Owns no weights (``network``) and no training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Literal

import numpy as np

from starmesh.prediction.batch import Floats, SampleBatch

COUNT_INPUTS = 4


class Depth(Enum):
    """Which layer's output a kind looks at."""

    NONE = "none"
    TWO_THIRDS = "two_thirds"
    LAST = "last"

    def layers(self, model_layers: int) -> tuple[int, ...]:
        """The layer of a model with that many."""
        if self is Depth.NONE:
            return ()
        return (model_layers,) if self is Depth.LAST else (two_thirds(model_layers),)


def two_thirds(model_layers: int) -> int:
    """The layer two thirds up: of those tried on the default model it says most of the remaining length."""
    return max(1, round(model_layers * 2 / 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """``hidden`` are the widths of the network's hidden layers. ``averaged`` looks at the average of the sequence's
    hidden states so far instead of the newest alone, ``counts`` also at its tokens so far and its prompt's. The outputs
    are the remaining ``tokens``, one number, or probabilities of ``bins`` of it (``lengths``)."""

    name: str
    depth: Depth
    hidden: tuple[int, ...]
    activation: Literal["relu", "silu"]
    outputs: Literal["tokens", "bins"]
    averaged: bool = False
    counts: bool = False

    def inputs(self, batch: SampleBatch) -> Floats:
        """[n, inputs] float32: hidden states of the batch's layers one after the other, then the counts."""
        averages = batch.averaged_states if self.averaged else None
        states = batch.hidden_states if averages is None else averages
        parts = [] if self.depth is Depth.NONE else [states.reshape(len(batch), -1).astype(np.float32)]
        if self.counts:
            output = batch.output_tokens.astype(np.float32)
            prompt = batch.prompt_tokens.astype(np.float32)
            # Lengths differ by ratios, time runs in tokens; and a prompt's last token is unlike all others.
            parts.append(np.stack([np.log1p(output), np.log1p(prompt), output / 100, output == 0], axis=1))
        return np.concatenate(parts, axis=1, dtype=np.float32)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            # STAR's (arXiv 2510.13668): d -> 2048 -> 512 -> 64 -> 1 on the last layer's state, trained with L1.
            Kind(name="mlp", depth=Depth.LAST, hidden=(2048, 512, 64), activation="relu", outputs="tokens"),
            # One linear layer, after "How Much is Left?" (arXiv 2607.05316).
            Kind(name="linear", depth=Depth.LAST, hidden=(), activation="relu", outputs="tokens"),
            # What the counts alone say: whatever looks at hidden states has to beat it.
            Kind(name="counts", depth=Depth.NONE, hidden=(64, 32), activation="silu", outputs="bins", counts=True),
            Kind(
                name="starmesh",
                depth=Depth.TWO_THIRDS,
                hidden=(128, 64),
                activation="silu",
                outputs="bins",
                averaged=True,
                counts=True,
            ),
        )
    }
)


def layers_of_kinds(model_layers: int) -> tuple[int, ...]:
    """The layers of a model that some kind looks at, ascending: what is worth collecting."""
    return tuple(sorted({layer for kind in KINDS.values() for layer in kind.depth.layers(model_layers)}))
