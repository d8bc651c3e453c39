"""Every model of the report by its name: networks and references, fitted on the same split.

Owns the registry, ``MODELS``, and what each needs of the samples. Owns no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from starmesh.prediction.batch import Floats, Integers
from starmesh.prediction.dataset import Dataset, Split
from starmesh.prediction.kinds import KINDS
from starmesh.prediction.training import references
from starmesh.prediction.training.fit import FitConfig, Progress, config_for, fit
from starmesh.prediction.training.references import Predict, PromptOnly


@dataclass(frozen=True, slots=True)
class Material:
    """What models are fitted to: samples with the layers that they look at, and the prompts' tokens where they are at
    hand (``prompts[index]`` is the prompt of request ``p<index>-...``)."""

    by_layers: Mapping[tuple[int, ...], Dataset]
    prompts: Sequence[Sequence[int]] = ()
    config: Callable[[str], FitConfig] | None = None
    on_epoch: Callable[[str, Progress], None] = field(default=lambda name, progress: None)

    def dataset(self, layers: tuple[int, ...]) -> Dataset:
        """The samples with these layers; without any, whichever."""
        return self.by_layers[layers] if layers else next(iter(self.by_layers.values()))


@dataclass(frozen=True, slots=True)
class FittedModel:
    """A model's predictions for rows of the dataset, and how many numbers it learned."""

    predict: Predict
    parameters: int


def _network(name: str, *, cut_as_ended: bool = False) -> Callable[[Material, Split], FittedModel]:
    """``cut_as_ended``: what was cut is taught as if it had wanted to end there."""

    def fitter(material: Material, split: Split) -> FittedModel:
        kind = KINDS[name]
        model_layers = max(layer for layers in material.by_layers for layer in layers)
        dataset = material.dataset(kind.depth.layers(model_layers))
        if cut_as_ended:
            dataset = replace(dataset, finished=np.ones_like(dataset.finished))
        config = config_for(kind) if material.config is None else material.config(name)
        network = fit(dataset, split, kind, config, on_epoch=lambda p: material.on_epoch(name, p)).network
        return FittedModel(lambda rows: network.predict(dataset.batch(rows)), network.parameters)

    return fitter


def _constant(material: Material, split: Split) -> FittedModel:
    return FittedModel(references.constant(material.dataset(()), split), 2)


def _conditional(material: Material, split: Split) -> FittedModel:
    return FittedModel(references.conditional(material.dataset(()), split), len(split.train) + len(split.validation))


def _prompt_only(
    make: Callable[[Material, Split], PromptOnly], read: Callable[[PromptOnly, Integers], Floats]
) -> Callable[[Material, Split], FittedModel]:
    def fitter(material: Material, split: Split) -> FittedModel:
        model = make(material, split)
        return FittedModel(lambda rows: read(model, rows), model.parameters)

    return fitter


def _state(material: Material, split: Split) -> PromptOnly:
    model_layers = max(layer for layers in material.by_layers for layer in layers)
    dataset = material.dataset(KINDS["starmesh"].depth.layers(model_layers))
    return references.prompt_state(dataset, split, _prompt_config(material))


def _bag(material: Material, split: Split) -> PromptOnly:
    dataset = material.dataset(())
    which = [int(request_id.removeprefix("p").partition("-")[0]) for request_id in dataset.request_ids]
    return references.prompt_bag(dataset, split, _prompt_config(material), material.prompts, which)


def _prompt_config(material: Material) -> FitConfig:
    base = config_for(KINDS["starmesh"]) if material.config is None else material.config("starmesh")
    # A sample a request: smaller batches, or an epoch were one step or two.
    return replace(base, batch_samples=64)


MODELS: Mapping[str, Callable[[Material, Split], FittedModel]] = MappingProxyType(
    {
        "constant": _constant,
        "conditional_median": _conditional,
        "linear": _network("linear"),
        "counts": _network("counts"),
        "prompt_bag": _prompt_only(_bag, PromptOnly.fixed),
        "prompt_bag_minus_elapsed": _prompt_only(_bag, PromptOnly.minus_elapsed),
        "prompt_state": _prompt_only(_state, PromptOnly.fixed),
        "prompt_state_minus_elapsed": _prompt_only(_state, PromptOnly.minus_elapsed),
        "prompt_state_given_elapsed": _prompt_only(_state, PromptOnly.given_elapsed),
        "mlp": _network("mlp"),
        "mlp_cut_as_ended": _network("mlp", cut_as_ended=True),
        "starmesh": _network("starmesh"),
    }
)
NEED_PROMPTS = frozenset({"prompt_bag", "prompt_bag_minus_elapsed"})
