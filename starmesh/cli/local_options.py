"""Options of the commands that start a cluster of their own, and what they stand for.

Owns no starting (``local_cluster``). Imports nothing that takes time: ``--help`` reads this.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from starmesh.cli.run import fail

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

DispatchPolicy = Literal[
    "round_robin", "least_requests", "least_tokens", "power_of_two", "predicted_load", "predicted_peak", "held_peak"
]
ReschedulingPolicy = Literal["none", "current_load", "llumnix", "star", "star_plus"]

Model = Annotated[str, typer.Option(metavar="NAME|DIR", help="Default model, hub id (org/name) or directory.")]
Prefill = Annotated[int, typer.Option(min=1, help="Prefill instances.")]
Decode = Annotated[int, typer.Option(min=1, help="Decode instances.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Element type of weights and KV.")]
KvMemoryMib = Annotated[int, typer.Option(min=1, help="Memory for KV blocks, per instance.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads of each instance.")]
RunDir = Annotated[Path | None, typer.Option(help="Directory for logs. (default: a new temporary one)")]
Predictor = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE|none",
        help="What predicts remaining tokens; none: no predictor. (default: the one shipped for the model, else one "
        "that learns from requests that have ended)",
    ),
]
PredictorDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Directory of further predictors, to promote by their names.")
]
CollectDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Store samples of all requests there, for training; no text.")
]
CollectMaxMib = Annotated[int, typer.Option(min=1, help="Disk space that the samples may take.")]
EVERY_TOKENS = 20
"""Tokens of a request between two of its samples: the engines' default."""
NO_PREDICTOR = "none"
ONLINE_PREDICTOR = "conditional_median"
"""The version that needs no file, takes samples of any layers, and learns from requests that have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicting:
    """How a local cluster predicts. ``predictor`` is a name, a file, "none", or empty for the default."""

    predictor: str = ""
    directory: Path | None = None
    collect: Path | None = None
    collect_max_mib: int | None = None

    @property
    def on(self) -> bool:
        """Whether the cluster has a predictor."""
        return self.predictor != NO_PREDICTOR

    def check(self, dispatch: str = "") -> None:
        """Raise typer.BadParameter where something needs the predictor that there is not."""
        wants = {
            "--predictor-dir": self.directory,
            "--collect": self.collect,
            "--dispatch": dispatch == "predicted_load",
        }
        for option, wanted in wants.items():
            if wanted and not self.on:
                raise typer.BadParameter(f"needs a predictor: leave out --predictor {NO_PREDICTOR}", param_hint=option)

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of the predictor service. Files are absolute: they are named where the user is."""
        predictor = self.predictor
        if predictor and Path(predictor).is_file():
            predictor = str(Path(predictor).absolute())
        flags = {
            "--predictor": predictor,
            "--predictor-dir": self.directory and str(self.directory.absolute()),
            "--collect": self.collect and str(self.collect.absolute()),
            "--collect-max-mib": str(self.collect_max_mib) if self.collect and self.collect_max_mib else "",
        }
        return tuple(part for flag, value in flags.items() if value for part in (flag, value))


def model_directory(name: str) -> Path:
    """The directory of a model, fetched if need be. Raises typer.Exit after a line on what to do."""
    from starmesh.model_files import ModelNotFound, fetch_model

    try:
        return fetch_model(name, progress=lambda line: print(line, file=sys.stderr))
    except ModelNotFound as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def run_directory(wanted: Path | None) -> Path:
    """Where logs go."""
    return wanted if wanted is not None else Path(tempfile.mkdtemp(prefix="starmesh-run-"))


def flags(values: dict[str, str | int | float]) -> tuple[str, ...]:
    """Flags for the services."""
    return tuple(part for flag, value in values.items() for part in (flag, str(value)))
