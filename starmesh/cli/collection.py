"""What a collection asks: which prompts, how often, in which order, under which names and seeds. Pure but for what
is written beside the samples to be.

A request's name is ``p<index>-<sample>``: the prompt's place in its file, counted from 0 without empty lines, and the
number of the answer to it, from 0. Samples hold no text, so that training finds the prompt by that name alone. The
seed of the sampling follows from the name: the same command asks for the same answers, also where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from starmesh.cli.run import CliError
from starmesh.model_files import model_name, model_revision
from starmesh.prediction.kinds import layers_of_kinds
from starmesh.prediction.shards import Manifest, ShardDirectory, ShardError
from starmesh.types import HiddenLayout

NOTE = "prompts.sha256"


@dataclass(frozen=True, slots=True)
class CollectionRequest:
    """One answer to be had."""

    request_id: str
    prompt: str

    @property
    def seed(self) -> int:
        """The first 32 bits, little-endian, of the SHA-256 of the name behind its p. The shipped predictor learned from
        answers with these seeds; with others its samples could not be had again."""
        return int.from_bytes(hashlib.sha256(self.request_id.removeprefix("p").encode()).digest()[:4], "little")


def hidden_sizes(model_directory: Path) -> tuple[int, int]:
    """A model's layers and the width of their outputs. Raises CliError where its configuration does not tell them."""
    try:
        config = json.loads((model_directory / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)  # of a model that reads more than text
        return int(config["num_hidden_layers"]), int(config["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CliError(
            f"config.json of {model_directory} does not tell the layers and their width: {error!r}"
        ) from None


def manifest_of(
    model_directory: Path,
    *,
    hidden_layers: str,
    every_tokens: int,
    dtype: str,
    max_output_tokens: int = 0,
    temperature: float | None = None,
) -> Manifest:
    """What the samples will have in common. ``hidden_layers`` is as an engine's flag, empty for those that any kind of
    predictor looks at. Limit and temperature are 0 and None where requests choose their own. Raises CliError for a
    model whose configuration does not tell its sizes, and other layers."""
    layers, width = hidden_sizes(model_directory)
    try:
        wanted = {int(layer) for layer in hidden_layers.split(",")} if hidden_layers else set(layers_of_kinds(layers))
    except ValueError:
        wanted = set()
    if not wanted or not all(1 <= layer <= layers for layer in wanted):
        raise CliError(f"--hidden-layers {hidden_layers}: give some of 1 to {layers}, separated by commas")
    return Manifest(
        layout=HiddenLayout(model_revision(model_directory), tuple(sorted(wanted)), width),
        model=model_name(model_directory),
        dtype=dtype,
        every_tokens=every_tokens,
        sampling={} if temperature is None else {"temperature": temperature},
        max_output_tokens=max_output_tokens,
    )


def layers_flag(manifest: Manifest) -> str:
    """The engines' flag for the layers of its samples."""
    return ",".join(map(str, manifest.layout.layers))


def prepare(directory: Path, manifest: Manifest, prompts_sha256: str = "") -> None:
    """Have ``directory`` say what its samples will be, before there are any; ``prompts_sha256`` is of a collection's
    prompts. Raises CliError when it holds others: of another manifest, or of other prompts, since requests' names would
    stand for other answers then."""
    note = directory / NOTE
    try:
        ShardDirectory(directory, manifest)
        if not prompts_sha256:
            return
        if not note.exists():
            note.write_text(prompts_sha256 + "\n", encoding="utf-8")
        elif note.read_text(encoding="utf-8").strip() != prompts_sha256:
            raise CliError(f"{directory} holds answers to other prompts; give another --out")
    except ShardError as error:
        raise CliError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"cannot use {directory}: {error}; give another --out") from None


def digest(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts, which neither the packing nor other fields of their file change."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def plan_requests(
    prompts: Sequence[str], *, requests: int | None, samples_per_prompt: int, seed: int
) -> list[CollectionRequest]:
    """The answers to be had, in order: prompts shuffled by ``seed``, each once before any twice.

    ``requests`` of them, which takes no more prompts than are needed for ``samples_per_prompt`` of each; None: of all
    prompts. What fewer requests ask for, more ask for too.
    """
    order = list(range(len(prompts)))
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, not a secret
    # By prompts it is decided what is asked for, so that more requests only add to it; then it is asked in turn.
    chosen = [(sample, place) for place in range(len(order)) for sample in range(samples_per_prompt)][:requests]
    return [CollectionRequest(f"p{order[place]}-{sample}", prompts[order[place]]) for sample, place in sorted(chosen)]


def left_out(planned: Sequence[CollectionRequest], stored: AbstractSet[str]) -> list[CollectionRequest]:
    """Those that are not stored yet."""
    return [request for request in planned if request.request_id not in stored]
