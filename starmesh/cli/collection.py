"""What a collection asks: which prompts, how often, in which order, under which names and seeds. Pure but for the
note of it that goes beside the samples.

A request's name is ``p<index>-<sample>``: the prompt's place in its file, counted from 0 without empty lines, and the
number of the answer to it, from 0. Samples hold no text, so that training finds the prompt by that name alone. The
seed of the sampling follows from the name: the same command asks for the same answers, also where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from starmesh.cli.run import CliError

NOTE = "collection.json"


@dataclass(frozen=True, slots=True)
class CollectionRequest:
    """One answer to be had."""

    request_id: str
    prompt: str

    @property
    def seed(self) -> int:
        """The first 63 bits of the SHA-256 of the name: what the wire's signed seed holds, and never negative."""
        return int.from_bytes(hashlib.sha256(self.request_id.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """What all answers of a directory have in common. ``prompts_sha256`` is of the prompts' text, in their order."""

    model: str
    prompts_sha256: str
    max_output_tokens: int
    temperature: float

    def keep(self, directory: Path) -> None:
        """Note it in ``directory``, made if need be. Raises CliError when another collection is there, since names
        would stand for other answers then, or nothing can be written."""
        path = directory / NOTE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if path.exists():
                there = json.loads(path.read_text(encoding="utf-8"))
                differing = [name for name, value in dataclasses.asdict(self).items() if there.get(name) != value]
                if differing:
                    raise CliError(
                        f"{directory} has samples collected with another {' and '.join(differing)}; see its {NOTE}, "
                        "or give another --out"
                    )
            else:
                path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CliError(f"cannot use {directory}: {error.strerror}; give another --out") from error
        except (ValueError, AttributeError) as error:
            raise CliError(f"{path} is broken ({error}); remove it if the samples there are of this command") from error


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
