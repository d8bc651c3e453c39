"""Collected samples as arrays, and their split for training: by request, never by sample.

Owns reading a directory of shards for one choice of layers, and folds. Requests that answer the same prompt (ids
``p<prompt>-<sample>``, as ``starmesh predictor collect`` names them) stay together, since what is learned of one would
give the other away. Requests of live traffic, of any other name, are each by itself. Owns no model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from starmesh.prediction.averaging import averaged
from starmesh.prediction.batch import Integers, SampleBatch
from starmesh.prediction.shards import Manifest, SampledSequence, ShardError, read_manifest, read_sequences

_COLLECTED = re.compile(r"(p\d+)-\d+")


@dataclass(frozen=True, slots=True)
class Dataset:
    """n samples of s sequences, each sequence's one after the other in the order in which they were stored.

    ``states`` and ``averages`` are [n, layers, width] float16; ``sequence`` [n] says whose each sample is; ``prompt``
    [s] groups sequences by prompt. ``remaining_tokens`` is a lower bound where ``finished`` [n] is false.
    """

    manifest: Manifest
    layers: tuple[int, ...]
    states: npt.NDArray[np.float16]
    averages: npt.NDArray[np.float16]
    prompt_tokens: Integers
    output_tokens: Integers
    remaining_tokens: Integers
    finished: npt.NDArray[np.bool_]
    sequence: Integers
    request_ids: tuple[str, ...]
    prompt: Integers
    total_tokens: Integers

    def __len__(self) -> int:
        return len(self.sequence)

    def batch(self, rows: Integers) -> SampleBatch:
        """Some samples."""
        return SampleBatch(
            hidden_states=self.states[rows],
            averaged_states=self.averages[rows].astype(np.float32),
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
        )

    def rows_of(self, sequences: Integers) -> Integers:
        """The samples of these sequences, in order."""
        return np.flatnonzero(np.isin(self.sequence, sequences))

    def lengths_of(self, sequences: Integers) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """Each sequence's output tokens, and whether the model ended it itself."""
        first = np.searchsorted(self.sequence, sequences)
        return self.total_tokens[sequences], self.finished[first]


def load_dataset(directory: Path, layers: tuple[int, ...], *, most_sequences: int | None = None) -> Dataset:
    """Read the samples of a directory, the states of ``layers`` only. Blocking.

    Raises ShardError when there are none, or the layers were not collected.
    """
    manifest = read_manifest(directory)
    missing = [layer for layer in layers if layer not in manifest.layout.layers]
    if missing:
        there = ", ".join(map(str, manifest.layout.layers))
        raise ShardError(
            f"{directory} holds layers {there}, not {missing[0]}: train on one of those with --layer, or collect again "
            f"with --hidden-layers {','.join(map(str, layers))}"
        )
    picked = [manifest.layout.layers.index(layer) for layer in layers]
    sequences: list[SampledSequence] = []
    states = []
    for sequence in read_sequences(directory):
        if most_sequences is not None and len(sequences) >= most_sequences:
            break
        if len(sequence.output_tokens):
            # Copied, so that the other layers' states are not kept.
            states.append(sequence.hidden_states[:, picked].copy())
            sequences.append(dataclasses.replace(sequence, hidden_states=states[-1]))
    if not sequences:
        raise ShardError(f"{directory} holds no sequence that has ended; `starmesh predictor collect` goes on there")
    averages = [
        averaged(state, entry.output_tokens).astype(np.float16) for state, entry in zip(states, sequences, strict=True)
    ]
    counts = [len(state) for state in states]
    groups = {
        name: number
        for number, name in enumerate(dict.fromkeys(map(_prompt_of, (entry.request_id for entry in sequences))))
    }
    positions = np.concatenate([entry.output_tokens for entry in sequences]).astype(np.int64)
    totals = np.array([entry.total_output_tokens for entry in sequences], dtype=np.int64)
    return Dataset(
        manifest=manifest,
        layers=layers,
        states=np.concatenate(states),
        averages=np.concatenate(averages),
        prompt_tokens=np.repeat([entry.prompt_tokens for entry in sequences], counts).astype(np.int64),
        output_tokens=positions,
        remaining_tokens=np.repeat(totals, counts) - positions,
        finished=np.repeat([entry.finished for entry in sequences], counts),
        sequence=np.repeat(np.arange(len(sequences)), counts),
        request_ids=tuple(entry.request_id for entry in sequences),
        prompt=np.array([groups[_prompt_of(entry.request_id)] for entry in sequences], dtype=np.int64),
        total_tokens=totals,
    )


@dataclass(frozen=True, slots=True)
class Split:
    """Sequences for fitting, for stopping early, and held out."""

    train: Integers
    validation: Integers
    test: Integers


def split(dataset: Dataset, *, seed: int) -> Split:
    """About 70 / 15 / 15 % of the prompts, as in the paper. Each prompt's part follows from its name and the seed only,
    so that a collection may grow and what was held out stays so."""
    names = dict(zip(dataset.prompt.tolist(), map(_prompt_of, dataset.request_ids), strict=True))
    places = np.array([_place(names[number], seed) for number in sorted(names)])
    parts = (places < 0.7, (places >= 0.7) & (places < 0.85), places >= 0.85)
    return Split(*(_of_prompts(dataset, np.flatnonzero(part)) for part in parts))


def folds(dataset: Dataset, count: int, *, seed: int) -> Iterator[Split]:
    """``count`` splits whose held-out parts are all sequences, each once; validation is an eighth of the rest."""
    parts = np.array_split(_shuffled(dataset, seed), count)
    for index, test in enumerate(parts):
        rest = np.concatenate([part for other, part in enumerate(parts) if other != index])
        validation = len(rest) // 8
        yield Split(*(_of_prompts(dataset, part) for part in (rest[validation:], rest[:validation], test)))


def _shuffled(dataset: Dataset, seed: int) -> Integers:
    return np.random.default_rng(seed).permutation(int(dataset.prompt.max()) + 1)


def _place(name: str, seed: int) -> float:
    """A number in [0, 1) that looks drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:6], "big") / (1 << 48)


def _of_prompts(dataset: Dataset, prompts: Integers) -> Integers:
    return np.flatnonzero(np.isin(dataset.prompt, prompts))


def _prompt_of(request_id: str) -> str:
    collected = _COLLECTED.fullmatch(request_id)
    return request_id if collected is None else collected[1]
