"""Collected samples on disk: safetensors shards, each beside nothing but its manifest.

Owns the format, its limits and the bound on disk. A shard holds whole sequences, so that a split by request is a split
of rows, and no prompt and no token: only hidden states, counts and request ids. Owns no collecting (the predictor
service) and no training.

A shard's tensors, for s sequences with n samples in all: ``hidden_states`` [n, layers, width] float16,
``sample_output_tokens`` [n], ``sample_counts`` [s], ``prompt_tokens`` [s], ``output_tokens`` [s] int32, and
``finished`` [s] uint8: 1 where the model itself ended the sequence, 0 where it was cut, so that ``output_tokens`` only
bounds what it would have become. The ids are in the metadata.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save

from starmesh.types import HiddenLayout

MANIFEST = "manifest.json"
MAX_SHARD_SEQUENCES = 4096

_SHARD_NAME = re.compile(r"shard-\d{6,}\.safetensors", re.ASCII)


class ShardError(ValueError):
    """A directory or file of samples cannot be used; the message says why, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the samples of a directory have in common: ``sampling`` and ``max_output_tokens`` (0 where requests differ)
    are those of the requests, ``dtype`` the engine's."""

    layout: HiddenLayout
    model: str
    dtype: str
    every_tokens: int
    sampling: dict[str, float | int] = field(default_factory=dict)
    max_output_tokens: int = 0

    def to_json(self) -> str:
        """As the file has it."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def of_json(cls, text: str) -> Manifest:
        """Raises ShardError for anything else than ``to_json`` writes."""
        try:
            read = json.loads(text)
            layout = read.pop("layout")
            layout["layers"] = tuple(layout["layers"])
            return cls(layout=HiddenLayout(**layout), **read)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ShardError(f"{MANIFEST} is not one of collected samples: {error}") from None


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """A sequence that has ended, with its samples in the order of their positions. ``output_tokens`` [n] counts what
    was generated at each, ``hidden_states`` is [n, layers, width] float16."""

    request_id: str
    prompt_tokens: int
    total_output_tokens: int
    finished: bool
    output_tokens: npt.NDArray[np.int32]
    hidden_states: npt.NDArray[np.float16]

    @property
    def remaining_tokens(self) -> npt.NDArray[np.int32]:
        """What was still to come at each sample, [n]: the label, or its lower bound unless ``finished``."""
        return self.total_output_tokens - self.output_tokens

    @property
    def stored_bytes(self) -> int:
        """About what it takes on disk."""
        return self.hidden_states.nbytes + 4 * len(self.output_tokens) + 64


@dataclass(frozen=True, slots=True)
class StoredSequence:
    """What a stored sequence is known by without its hidden states."""

    request_id: str
    total_output_tokens: int
    finished: bool
    samples: int


class ShardDirectory:
    """A directory of shards with one manifest. One process at a time writes into it.

    Raises ShardError when ``manifest`` differs from the one that is there.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / MANIFEST
        if path.exists():
            there = Manifest.of_json(path.read_text(encoding="utf-8"))
            if there != manifest:
                raise ShardError(
                    f"{directory} holds samples of another kind ({_difference(there, manifest)}); use another directory"
                )
        else:
            _write(path, manifest.to_json().encode())
        self.manifest = manifest

    def write(self, sequences: Sequence[SampledSequence]) -> Path:
        """Add a shard, whole or not at all. Blocking. Raises ShardError for sequences of another layout, and none."""
        layout = self.manifest.layout
        if not 0 < len(sequences) <= MAX_SHARD_SEQUENCES:
            raise ShardError(f"a shard holds 1 to {MAX_SHARD_SEQUENCES} sequences, not {len(sequences)}")
        shape = (len(layout.layers), layout.width)
        if any(sequence.hidden_states.shape[1:] != shape for sequence in sequences):
            raise ShardError(f"the samples of {self.directory} are {list(shape)} each")
        tensors: dict[str, npt.NDArray[Any]] = {
            "hidden_states": np.concatenate([sequence.hidden_states for sequence in sequences]).astype(np.float16),
            "sample_output_tokens": np.concatenate([sequence.output_tokens for sequence in sequences]).astype(np.int32),
            "sample_counts": _column(len(sequence.output_tokens) for sequence in sequences),
            "prompt_tokens": _column(sequence.prompt_tokens for sequence in sequences),
            "output_tokens": _column(sequence.total_output_tokens for sequence in sequences),
            "finished": _column(sequence.finished for sequence in sequences).astype(np.uint8),
        }
        ids = json.dumps([sequence.request_id for sequence in sequences])
        numbers = [int(path.stem.removeprefix("shard-")) for path in shard_paths(self.directory)]
        path = self.directory / f"shard-{max(numbers, default=-1) + 1:06d}.safetensors"
        _write(path, save(tensors, metadata={"request_ids": ids}))
        return path


def shard_paths(directory: Path) -> list[Path]:
    """The shards there, oldest first. Files of other names are none: a copy would count its sequences twice."""
    return sorted(path for path in directory.glob("shard-*.safetensors") if _SHARD_NAME.fullmatch(path.name))


def read_manifest(directory: Path) -> Manifest:
    """Raises ShardError when there is none that can be used."""
    try:
        return Manifest.of_json((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(
            f"{directory} has no {MANIFEST}: no samples were collected there; `starmesh predictor collect` does"
        ) from None


def read_stored(directory: Path) -> list[StoredSequence]:
    """Every stored sequence without its samples: fast, however many there are. Raises ShardError for a shard that
    can't be read."""
    found = []
    for path in shard_paths(directory):
        with _opened(path) as shard:
            ids = _request_ids(path, shard)
            if missing := {"output_tokens", "finished", "sample_counts"} - set(shard.keys()):
                raise ShardError(f"{path} is no shard of samples: it lacks {sorted(missing)[0]!r}")
            columns = [shard.get_tensor(name) for name in ("output_tokens", "finished", "sample_counts")]
        found += [
            StoredSequence(request_id, int(total), bool(finished), int(samples))
            for request_id, total, finished, samples in zip(ids, *columns, strict=True)
        ]
    return found


def read_sequences(directory: Path) -> Iterator[SampledSequence]:
    """Every stored sequence. Raises ShardError for a shard that does not fit the manifest."""
    layout = read_manifest(directory).layout
    for path in shard_paths(directory):
        with _opened(path) as shard:
            ids = _request_ids(path, shard)
            columns = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - not a mapping
        yield from _sequences(path, ids, columns, layout)


def _sequences(
    path: Path, ids: list[str], columns: dict[str, npt.NDArray[Any]], layout: HiddenLayout
) -> Iterator[SampledSequence]:
    try:
        states, positions = columns["hidden_states"], columns["sample_output_tokens"]
        counts, prompts = columns["sample_counts"], columns["prompt_tokens"]
        totals, finished = columns["output_tokens"], columns["finished"]
    except KeyError as error:
        raise ShardError(f"{path} is no shard of samples: it lacks {error}") from None
    ends = np.cumsum(counts)
    if (
        states.shape != (len(positions), len(layout.layers), layout.width)
        or not len(ids) == len(counts) == len(prompts) == len(totals) == len(finished)
        or (len(counts) and (counts.min() < 0 or int(ends[-1]) != len(positions)))
    ):
        raise ShardError(f"{path} does not fit its manifest; remove it")
    for index, (request_id, end) in enumerate(zip(ids, ends, strict=True)):
        rows = slice(int(end) - int(counts[index]), int(end))
        yield SampledSequence(
            request_id=request_id,
            prompt_tokens=int(prompts[index]),
            total_output_tokens=int(totals[index]),
            finished=bool(finished[index]),
            output_tokens=positions[rows].astype(np.int32),
            hidden_states=states[rows].astype(np.float16),
        )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except Exception as error:  # safetensors raises a type of its own that it does not export everywhere
        raise ShardError(f"{path} cannot be read ({error}); remove it") from None


def _request_ids(path: Path, shard: Any) -> list[str]:
    try:
        return [str(name) for name in json.loads((shard.metadata() or {})["request_ids"])]
    except (KeyError, ValueError, TypeError):
        raise ShardError(f"{path} names no requests; remove it") from None


def _column(values: Iterable[int]) -> npt.NDArray[np.int32]:
    return np.fromiter(values, dtype=np.int32)


def _difference(there: Manifest, wanted: Manifest) -> str:
    fields = (field.name for field in dataclasses.fields(Manifest))
    return ", ".join(
        f"{name} {getattr(there, name)} and not {getattr(wanted, name)}"
        for name in fields
        if getattr(there, name) != getattr(wanted, name)
    )


def _write(path: Path, content: bytes) -> None:
    """In one step, so that a reader or a restart never finds half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.rename(path)
