"""Fits one network of a kind to collected samples.

Owns the loss, the loop and early stopping. Reproducible: the same samples, split and seed give the same weights on the
same machine. Owns no reading of samples (``dataset``) and no choice of split.

A kind that puts out tokens learns by L1, the paper's loss, from the sequences that ended by themselves. One that puts
out bins learns by cross-entropy, and from cut sequences too: of those it is known that the length lies in the cut's bin
or beyond (a censored likelihood, as in survival analysis).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from starmesh.prediction.batch import UPPER_QUANTILE, Floats, Integers
from starmesh.prediction.dataset import Dataset, Split
from starmesh.prediction.kinds import COUNT_INPUTS, Kind
from starmesh.prediction.lengths import bin_edges, bin_of
from starmesh.prediction.network import Dense, Network
from starmesh.types import HiddenLayout

_TOKENS_SCALE = 100.0  # labels of the L1 loss in hundreds of tokens, so that its gradients are of order 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    """The paper's bounds of training: at most 100 epochs, early stop with patience 10. The rest is our choice, made on
    the default model (docs/predictor.md). ``state_dropout`` hides that part of the hidden state's elements in each
    step: with thousands of requests and hundreds of elements a network otherwise learns the requests by heart."""

    epochs: int = 100
    patience: int = 10
    batch_samples: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    state_dropout: float = 0.0
    dropout: float = 0.0
    seed: int = 0
    device: str = "cpu"


def config_for(kind: Kind, *, seed: int = 0, device: str = "cpu", epochs: int = 100) -> FitConfig:
    """What a kind is trained with: the paper's and the linear one as published, ours with what it was found to need."""
    if kind.outputs == "tokens":
        return FitConfig(seed=seed, device=device, epochs=epochs, weight_decay=0.0)
    return FitConfig(seed=seed, device=device, epochs=epochs, state_dropout=0.5, dropout=0.3)


@dataclass(frozen=True, slots=True)
class Progress:
    """After an epoch: the validation loss, and the best so far."""

    epoch: int
    epochs: int
    loss: float
    best_loss: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """The network of the best epoch."""

    network: Network
    epoch: int
    loss: float


def fit(
    dataset: Dataset,
    split: Split,
    kind: Kind,
    config: FitConfig,
    *,
    on_epoch: Callable[[Progress], None] = lambda progress: None,
) -> Fitted:
    """Train on ``split.train``, stop by ``split.validation``. Raises ValueError when either has no sequence that ended
    by itself, and for a device that is not there."""
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: torch finds no CUDA device; use --device cpu")
    rows = [dataset.rows_of(part) for part in (split.train, split.validation)]
    if kind.outputs == "tokens":
        rows = [part[dataset.finished[part]] for part in rows]
    if any(not dataset.finished[part].any() for part in rows):
        raise ValueError(f"{len(dataset.request_ids)} requests are too few to train with: collect some hundreds")
    edges = bin_edges(int(dataset.remaining_tokens.max()))
    inputs = [kind.inputs(dataset.batch(part)) for part in rows]
    mean = inputs[0].mean(axis=0)
    scale = inputs[0].std(axis=0) + np.float32(1e-3)
    torch.manual_seed(config.seed)
    states = inputs[0].shape[1] - (COUNT_INPUTS if kind.counts else 0)
    module = _Module(states, inputs[0].shape[1], kind, len(edges) - 1 if kind.outputs == "bins" else 1, config)
    module.to(config.device)
    data = [
        _Part((part - mean) / scale, dataset.remaining_tokens[where], dataset.finished[where], edges, config.device)
        for part, where in zip(inputs, rows, strict=True)
    ]
    loss = _token_loss if kind.outputs == "tokens" else _bin_loss
    best = _train(module, data[0], data[1], loss=loss, config=config, on_epoch=on_epoch)
    network = Network(
        description=kind,
        layout=HiddenLayout(dataset.manifest.layout.model_revision, dataset.layers, dataset.manifest.layout.width),
        mean=mean,
        scale=scale,
        dense=module.exported(_TOKENS_SCALE if kind.outputs == "tokens" else 1.0),
        edges=edges,
        upper_ratio=1.0,
    )
    if kind.outputs == "tokens":
        network = _with_upper(network, inputs[1], dataset.remaining_tokens[rows[1]])
    return Fitted(network, best.epoch, best.best_loss)


class _Part:
    """Samples as tensors on the device."""

    def __init__(self, inputs: Floats, remaining: Integers, finished: np.ndarray, edges: Integers, device: str) -> None:
        self.inputs = torch.from_numpy(inputs.astype(np.float32)).to(device)
        self.tokens = torch.from_numpy((remaining / _TOKENS_SCALE).astype(np.float32)).to(device)
        self.bins = torch.from_numpy(bin_of(remaining, edges)).to(device)
        self.finished = torch.from_numpy(finished).to(device)


class _Module(torch.nn.Module):
    """The network while it learns. Dropout of the states only: the counts are few and certain."""

    def __init__(self, states: int, inputs: int, kind: Kind, outputs: int, config: FitConfig) -> None:
        super().__init__()
        self._states = states
        self._state_dropout = torch.nn.Dropout(config.state_dropout)
        self._dropout = torch.nn.Dropout(config.dropout)
        self._activation = torch.nn.ReLU() if kind.activation == "relu" else torch.nn.SiLU()
        widths = [inputs, *kind.hidden, outputs]
        self._dense = torch.nn.ModuleList(
            torch.nn.Linear(before, after) for before, after in itertools.pairwise(widths)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self._state_dropout(x[:, : self._states]), x[:, self._states :]], dim=1)
        *hidden, last = self._dense
        for dense in hidden:
            x = self._dropout(self._activation(dense(x)))
        result: torch.Tensor = last(x)
        return result

    def exported(self, output_scale: float) -> tuple[Dense, ...]:
        """The weights, the last layer's scaled."""
        scales = [1.0] * (len(self._dense) - 1) + [output_scale]
        return tuple(
            Dense(
                (module.get_parameter("weight").detach() * scale).cpu().numpy().astype(np.float32),
                (module.get_parameter("bias").detach() * scale).cpu().numpy().astype(np.float32),
            )
            for module, scale in zip(self._dense, scales, strict=True)
        )


def _token_loss(outputs: torch.Tensor, part: _Part, rows: torch.Tensor) -> torch.Tensor:
    return (outputs[:, 0] - part.tokens[rows]).abs().mean()


def _bin_loss(outputs: torch.Tensor, part: _Part, rows: torch.Tensor) -> torch.Tensor:
    """Minus the log of the probability of what is known: the bin, or that bin and all beyond."""
    log_probabilities = torch.log_softmax(outputs, dim=1)
    bins = part.bins[rows][:, None]
    beyond = torch.arange(outputs.shape[1], device=outputs.device)[None] >= bins
    censored = torch.logsumexp(log_probabilities.masked_fill(~beyond, -torch.inf), dim=1)
    exact = log_probabilities.gather(1, bins)[:, 0]
    return -torch.where(part.finished[rows], exact, censored).mean()


def _train(
    module: _Module,
    train: _Part,
    validation: _Part,
    *,
    loss: Callable[[torch.Tensor, _Part, torch.Tensor], torch.Tensor],
    config: FitConfig,
    on_epoch: Callable[[Progress], None],
) -> Progress:
    """Leaves the weights of the best epoch in ``module``."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    order = torch.Generator().manual_seed(config.seed)
    every = torch.arange(len(validation.inputs), device=config.device)
    best = Progress(0, config.epochs, float("inf"), float("inf"))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    for epoch in range(1, config.epochs + 1):
        module.train()
        shuffled = torch.randperm(len(train.inputs), generator=order).to(config.device)
        for rows in torch.split(shuffled, config.batch_samples):
            optimizer.zero_grad()
            torch.autograd.backward(loss(module(train.inputs[rows]), train, rows))
            optimizer.step()
        module.eval()
        with torch.inference_mode():
            value = loss(module(validation.inputs), validation, every).item()
        if value < best.best_loss:
            best = Progress(epoch, config.epochs, value, value)
            weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        on_epoch(Progress(epoch, config.epochs, value, best.best_loss))
        if epoch - best.epoch >= config.patience:
            break
    module.load_state_dict(weights)
    return best


def _with_upper(network: Network, inputs: Floats, remaining: Integers) -> Network:
    """With the ratio that covers nine of ten validation samples (split conformal prediction; Lei et al., JASA 2018)."""
    predicted = np.maximum(network.forward(inputs)[:, 0], 1.0)
    ratio = float(np.quantile(remaining / predicted, UPPER_QUANTILE))
    return Network(
        description=network.description,
        layout=network.layout,
        mean=network.mean,
        scale=network.scale,
        dense=network.dense,
        edges=network.edges,
        upper_ratio=max(1.0, ratio),
    )
