"""Takes hidden states out of a model's forward: the outputs of some of its layers, at some rows of the batch.

Owns where a layer's output is found, and its copy. Owns no choice of rows, and changes nothing of the forward: hooks
look on. The final hidden state, after the last norm, is what the output layer multiplies, in every family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from starmesh.engine.checkpoint import UnsupportedModel
from starmesh.prediction.kinds import layers_of_kinds
from starmesh.types import HiddenLayout


def choose_layers(wanted: Sequence[int] | None, *, layers: int) -> tuple[int, ...]:
    """The layers whose output is kept, of a model with ``layers``: those ``wanted``, ascending; None is all that some
    kind of predictor looks at. Raises ValueError for numbers that are no layers."""
    if wanted is None:
        wanted = layers_of_kinds(layers)
    wrong = [str(layer) for layer in wanted if not 1 <= layer <= layers]
    if wrong:
        raise ValueError(
            f"hidden layers {', '.join(wrong)}: the model has {layers}; name some of 1 to {layers}, or none"
        )
    return tuple(sorted(set(wanted)))


class HiddenStates:
    """Watches the forwards of one model: ``expect`` before each, and ``take`` after those that some rows are wanted of.
    The others keep nothing."""

    def __init__(self, model: Any, layout: HiddenLayout, *, layers: int) -> None:
        """Raises UnsupportedModel when the model's layers are not found."""
        self._layout = layout
        self._token_rows: torch.Tensor | None = None
        self._head_rows: torch.Tensor | None = None
        self._kept: dict[int, torch.Tensor] = {}
        inner = [layer for layer in layout.layers if layer < layers]
        stack: Sequence[nn.Module] = list(_layer_stack(model, layers)) if inner else []
        self._hooks = [stack[layer - 1].register_forward_hook(self._keeper(layer)) for layer in inner]
        if layers in layout.layers:
            head = model.get_output_embeddings()
            self._hooks.append(head.register_forward_pre_hook(self._keep_head_input))
        self._last = layers

    def expect(self, head_tokens: torch.Tensor, wanted: torch.Tensor | None) -> None:
        """Of the next forward, which hands the tokens ``head_tokens`` of its batch to the output layer, keep
        ``wanted``, which are indices into these; nothing for None."""
        self._head_rows = wanted
        self._token_rows = None if wanted is None else head_tokens[wanted]
        self._kept = {}  # those of a forward that failed

    def take(self) -> torch.Tensor:
        """[rows, layers, width] of the forward since ``expect``, on the model's device and in its type. Raises
        UnsupportedModel when the layers did not yield them."""
        assert self._token_rows is not None
        rows, kept, layout = len(self._token_rows), self._kept, self._layout
        self._token_rows, self._head_rows, self._kept = None, None, {}
        if any(layer not in kept or kept[layer].shape != (rows, layout.width) for layer in layout.layers):
            raise UnsupportedModel(
                f"the layers of this model do not yield hidden states [tokens, {layout.width}] each: serve it with "
                "--hidden-layers none, or name its last layer only"
            )
        return torch.stack([kept[layer] for layer in layout.layers], dim=1)

    def close(self) -> None:
        """Let go of the model."""
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, layer: int) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._token_rows is not None:
                # Copied at once, the rows wanted only: what comes after may write into the layer's output.
                states = output[0] if isinstance(output, tuple) else output
                self._kept[layer] = states[0].index_select(0, self._token_rows)

        return keep

    def _keep_head_input(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self._head_rows is not None:
            self._kept[self._last] = inputs[0][0].index_select(0, self._head_rows)


def _layer_stack(model: nn.Module, layers: int) -> nn.ModuleList:
    """The decoder layers: the outermost list of as many modules as the model has layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise UnsupportedModel(
        f"the {layers} layers of this model are not found: serve it with --hidden-layers none, or name its last layer "
        "only"
    )
