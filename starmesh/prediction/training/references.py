"""What a trained predictor has to beat: references fitted on the same split.

Owns the references of the report; ``fit`` owns the networks. Each predicts [n, 2], median and 0.9 quantile, for rows of
a dataset. The prompt-only ones are of TetriInfer's kind (arXiv 2401.11181): they see the prompt once and never look
again. In place of its fine-tuned OPT-125M, which does not train here in reasonable time, stand a network over the
prompt's bag of tokens and one over the served model's own state at the prompt's end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from starmesh.prediction.batch import Floats, Integers
from starmesh.prediction.conditional_median import ConditionalMedian
from starmesh.prediction.dataset import Dataset, Split
from starmesh.prediction.kinds import Depth, Kind
from starmesh.prediction.network import LEVELS, Network
from starmesh.prediction.training.fit import FitConfig, fit

Predict = Callable[[Integers], Floats]

BAG_FACTORS = 128
_PROMPT_KIND = Kind(
    name="prompt_only", depth=Depth.LAST, hidden=(64,), activation="silu", outputs="bins", averaged=False, counts=True
)


def constant(dataset: Dataset, split: Split) -> Predict:
    """The median and 0.9 quantile of what remained in training, whatever the sample."""
    rows = dataset.rows_of(np.concatenate([split.train, split.validation]))
    both = np.quantile(dataset.remaining_tokens[rows], LEVELS).astype(np.float32)
    return lambda wanted: np.tile(both, (len(wanted), 1))


def conditional(dataset: Dataset, split: Split) -> Predict:
    """The median given the tokens generated so far."""
    model = ConditionalMedian(window=len(dataset.request_ids))
    lengths, finished = dataset.lengths_of(np.concatenate([split.train, split.validation]))
    model.fit(lengths.tolist(), finished.tolist())
    return lambda wanted: model.predict(dataset.batch(wanted))


@dataclasses.dataclass(frozen=True, slots=True)
class PromptOnly:
    """Predicts each request's whole length from its prompt: probabilities [s, bins]."""

    dataset: Dataset
    probabilities: Floats
    edges: Integers
    parameters: int

    def fixed(self, rows: Integers) -> Floats:
        """The length predicted from the prompt, whatever was generated since."""
        return self._quantiles(rows, given=np.zeros(len(rows), dtype=np.int64))

    def minus_elapsed(self, rows: Integers) -> Floats:
        """The same minus the tokens generated."""
        elapsed = self.dataset.output_tokens[rows][:, None].astype(np.float32)
        left: Floats = np.maximum(self.fixed(rows) - elapsed, 0.0).astype(np.float32)
        return left

    def given_elapsed(self, rows: Integers) -> Floats:
        """The quantiles of the predicted distribution given that it goes beyond the tokens generated, minus those: the
        best that a prediction from the prompt can be made into."""
        elapsed = self.dataset.output_tokens[rows]
        beyond = self._quantiles(rows, given=elapsed) - elapsed[:, None]
        left: Floats = np.maximum(beyond, 0.0).astype(np.float32)
        return left

    def _quantiles(self, rows: Integers, *, given: Integers) -> Floats:
        """Quantiles of the length given that it exceeds ``given``: linear within a bin."""
        cumulative = np.cumsum(self.probabilities[self.dataset.sequence[rows]].astype(np.float64), axis=1)
        cumulative = np.concatenate([np.zeros((len(rows), 1)), cumulative / cumulative[:, -1:]], axis=1)
        below = np.array([np.interp(at, self.edges, c) for at, c in zip(given, cumulative, strict=True)])
        columns = [
            [np.interp(b + level * (1 - b), c, self.edges) for b, c in zip(below, cumulative, strict=True)]
            for level in LEVELS
        ]
        return np.array(columns, dtype=np.float32).T


def prompt_state(dataset: Dataset, split: Split, config: FitConfig) -> PromptOnly:
    """From the served model's own hidden state at the prompt's last token."""
    return _prompt_only(dataset, split, config, dataset.rows_of(np.arange(len(dataset.request_ids))))


def prompt_bag(
    dataset: Dataset, split: Split, config: FitConfig, prompts: Sequence[Sequence[int]], which: Sequence[int]
) -> PromptOnly:
    """From the prompt's tokens without their order: tf-idf counts, reduced to ``BAG_FACTORS`` factors over all
    ``prompts`` (latent semantic analysis). ``which`` names each sequence's prompt."""
    factors = _factors(prompts)[list(which)]
    first = np.searchsorted(dataset.sequence, np.arange(len(dataset.request_ids)))
    layout = dataclasses.replace(dataset.manifest.layout, layers=(0,), width=BAG_FACTORS)
    bags = dataclasses.replace(
        dataset,
        manifest=dataclasses.replace(dataset.manifest, layout=layout),
        layers=(0,),
        states=factors[:, None].astype(np.float16),
        averages=factors[:, None].astype(np.float16),
        prompt_tokens=dataset.prompt_tokens[first],
        output_tokens=np.zeros(len(first), dtype=np.int64),
        remaining_tokens=dataset.total_tokens,
        finished=dataset.finished[first],
        sequence=np.arange(len(first)),
    )
    found = _prompt_only(bags, split, config, np.arange(len(first)))
    return dataclasses.replace(found, dataset=dataset)


def _prompt_only(dataset: Dataset, split: Split, config: FitConfig, rows: Integers) -> PromptOnly:
    at_prompt = rows[dataset.output_tokens[rows] == 0]
    sequences = dataset.sequence[at_prompt]
    only = dataclasses.replace(
        dataset,
        states=dataset.states[at_prompt],
        averages=dataset.averages[at_prompt],
        prompt_tokens=dataset.prompt_tokens[at_prompt],
        output_tokens=dataset.output_tokens[at_prompt],
        remaining_tokens=dataset.remaining_tokens[at_prompt],
        finished=dataset.finished[at_prompt],
        sequence=sequences,
    )
    network = fit(only, split, _PROMPT_KIND, config).network
    probabilities = np.zeros((len(dataset.request_ids), len(network.edges) - 1), dtype=np.float32)
    probabilities[sequences] = _probabilities(network, only)
    # Without a sample of its prompt nothing is known of a request: the mean of all.
    missing = np.setdiff1d(np.arange(len(dataset.request_ids)), sequences)
    probabilities[missing] = probabilities[sequences].mean(axis=0)
    return PromptOnly(dataset, probabilities, network.edges, network.parameters)


def _probabilities(network: Network, dataset: Dataset) -> Floats:
    outputs = network.forward(network.description.inputs(dataset.batch(np.arange(len(dataset)))))
    exponentials = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    result: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result


def _factors(prompts: Sequence[Sequence[int]]) -> Floats:
    """[prompts, BAG_FACTORS]."""
    counts = [np.unique(np.asarray(prompt, dtype=np.int64), return_counts=True) for prompt in prompts]
    tokens = np.concatenate([ids for ids, _ in counts])
    columns, column_of = np.unique(tokens, return_inverse=True)
    documents = np.bincount(column_of, minlength=len(columns))
    idf = np.log((1 + len(prompts)) / (1 + documents)) + 1
    values = np.concatenate([1 + np.log(number) for _, number in counts]) * idf[column_of]
    rows = np.repeat(np.arange(len(prompts)), [len(ids) for ids, _ in counts])
    norms = np.sqrt(np.bincount(rows, weights=values**2, minlength=len(prompts)))
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([rows, column_of])),
        torch.from_numpy((values / norms[rows]).astype(np.float32)),
        (len(prompts), len(columns)),
        check_invariants=True,
    ).coalesce()
    torch.manual_seed(0)
    left, sizes, _ = torch.svd_lowrank(matrix, q=min(BAG_FACTORS, len(prompts), len(columns)), niter=4)
    factors = (left * sizes).numpy()
    padded = np.zeros((len(prompts), BAG_FACTORS), dtype=np.float32)
    padded[:, : factors.shape[1]] = factors
    return padded
