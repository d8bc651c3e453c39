"""A trained predictor as one safetensors file: no pickle, and nothing runs when it is read.

Owns the format, its checks, and where the predictors are that ship with starmesh. The weights are stored in float16
where that is asked for; a forward is in float32 always.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from starmesh.prediction.batch import Floats
from starmesh.prediction.kinds import COUNT_INPUTS, KINDS, Depth
from starmesh.prediction.network import Dense, Network
from starmesh.types import HiddenLayout

FORMAT: Final = "starmesh-predictor-1"
SUFFIX: Final = ".safetensors"
MAX_FILE_BYTES: Final = 1 << 30


class PredictorFileError(ValueError):
    """A file is no predictor that can be used; the message says why, and what to do."""


def predictor_version(path: Path) -> str:
    """The name under which a file's predictor is known: the file's, without its suffix."""
    return path.name.removesuffix(SUFFIX)


def shipped_predictors() -> list[Path]:
    """The predictors that came with starmesh."""
    return sorted((Path(__file__).parent / "trained").glob(f"*{SUFFIX}"))


def shipped_predictor(model_revision: str) -> Path | None:
    """The one for a model, if there is one."""
    for path in shipped_predictors():
        if read_description(path).model_revision == model_revision:
            return path
    return None


def save_predictor(network: Network, path: Path, *, trained: dict[str, Any], half: bool = False) -> None:
    """Write in one step. ``trained`` says how it came about, for people; it must be JSON. ``half`` stores float16."""
    dtype = np.float16 if half else np.float32
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "mean": network.mean,
        "scale": network.scale,
        "edges": network.edges,
        "upper_ratio": np.array([network.upper_ratio], dtype=np.float32),
    }
    for index, layer in enumerate(network.dense):
        tensors[f"dense.{index}.weight"] = np.ascontiguousarray(layer.weight.astype(dtype))
        tensors[f"dense.{index}.bias"] = np.ascontiguousarray(layer.bias.astype(dtype))
    metadata = {
        "format": FORMAT,
        "kind": network.kind,
        "layout": json.dumps(dataclasses.asdict(network.layout)),
        "trained": json.dumps(trained),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(save(tensors, metadata=metadata))
    temporary.rename(path)


def read_description(path: Path) -> HiddenLayout:
    """The layout of a file's predictor, without its weights. Raises PredictorFileError."""
    return _layout(path, _metadata(path))


def read_trained(path: Path) -> dict[str, Any]:
    """How a file's predictor came about. Raises PredictorFileError."""
    trained: dict[str, Any] = json.loads(_metadata(path).get("trained", "{}"))
    return trained


def load_predictor(path: Path) -> Network:
    """Read a predictor. Blocking. Raises PredictorFileError for a file that is missing, broken or inconsistent."""
    metadata = _metadata(path)
    layout = _layout(path, metadata)
    kind = KINDS.get(metadata.get("kind", ""))
    if kind is None:
        raise PredictorFileError(
            f"{path} is of kind {metadata.get('kind')!r}; this version of starmesh has {', '.join(KINDS)}"
        )
    try:
        with safe_open(path, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    except TypeError as error:  # a type that numpy does not have
        raise PredictorFileError(f"{path} has numbers of another kind ({error}): train it again") from None
    try:
        dense = tuple(
            Dense(_floats(tensors[f"dense.{index}.weight"]), _floats(tensors[f"dense.{index}.bias"]))
            for index in range(len(kind.hidden) + 1)
        )
        network = Network(
            description=kind,
            layout=layout,
            mean=_floats(tensors["mean"]),
            scale=_floats(tensors["scale"]),
            dense=dense,
            edges=tensors["edges"].astype(np.int64),
            upper_ratio=float(tensors["upper_ratio"].item()),
        )
    except KeyError as error:
        raise PredictorFileError(f"{path} lacks {error}: train it again with `starmesh predictor train`") from None
    except ValueError as error:
        raise PredictorFileError(f"{path} is no predictor ({error}): train it again") from None
    _check(path, network)
    return network


def _check(path: Path, network: Network) -> None:
    """Raise unless the shapes fit together and every number is one."""
    kind, layout = network.description, network.layout
    states = 0 if kind.depth is Depth.NONE else len(layout.layers) * layout.width
    inputs = states + (COUNT_INPUTS if kind.counts else 0)
    outputs = network.edges.size - 1 if kind.outputs == "bins" else 1
    widths = [inputs, *kind.hidden, outputs]
    shapes = [layer.weight.shape for layer in network.dense]
    expected = [(after, before) for before, after in itertools.pairwise(widths)]
    biases = [layer.bias.shape for layer in network.dense]
    numbers = [network.mean, network.scale, *(part for layer in network.dense for part in (layer.weight, layer.bias))]
    if (
        shapes != expected
        or biases != [(after,) for after in widths[1:]]
        or not network.mean.shape == network.scale.shape == (inputs,)
        or network.edges.ndim != 1
        or (kind.outputs == "bins" and (outputs < 1 or np.any(np.diff(network.edges) < 1)))
        or not all(np.isfinite(part).all() for part in numbers)
        or not (network.scale > 0).all()
        or not 1 <= network.upper_ratio < np.inf
    ):
        raise PredictorFileError(
            f"{path} does not fit its description ({kind.name}, {inputs} inputs): train it again with "
            "`starmesh predictor train`"
        )


def _layout(path: Path, metadata: dict[str, str]) -> HiddenLayout:
    try:
        read = json.loads(metadata["layout"])
        return HiddenLayout(str(read["model_revision"]), tuple(map(int, read["layers"])), int(read["width"]))
    except (KeyError, ValueError, TypeError) as error:
        raise PredictorFileError(f"{path} does not say which samples it takes ({error})") from None


def _metadata(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PredictorFileError(f"{path} has over {MAX_FILE_BYTES >> 20} MiB: no predictor is that large")
        with safe_open(path, framework="numpy") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
    except PredictorFileError:
        raise
    except FileNotFoundError:
        raise PredictorFileError(f"there is no {path}; `starmesh predictor train` makes one") from None
    except Exception as error:  # safetensors raises a type of its own
        raise PredictorFileError(f"{path} is no safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise PredictorFileError(f"{path} is no predictor of this version of starmesh ({FORMAT}); train it again")
    return metadata


def _floats(array: np.ndarray[Any, Any]) -> Floats:
    return array.astype(np.float32)
