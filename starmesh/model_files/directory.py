"""What a model's directory must hold, and what the model in it is called.

Owns the checks and names that need only the files. Owns no way to get them (``hub``, ``packaged``).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

ORIGIN_FILE: Final = "starmesh.json"
"""Records where a converted model came from and what it is called: ``{"name": ..., "source": ...}``."""

_REVISION_SAMPLES = 64
_REVISION_SAMPLE_BYTES = 64 * 1024


class ModelNotFound(Exception):
    """A model is not here and could not be fetched; the message says what to do."""


def check_model(directory: Path) -> Path:
    """Return ``directory``. Raises ModelNotFound naming the files that it lacks to be served."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (directory / name).is_file()]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        missing += sorted(name for name in shards if not (directory / name).is_file())
    elif not any(directory.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ModelNotFound(
            f"{directory} is not a model that can be served: it lacks {', '.join(missing)}; "
            "give the directory of a Hugging Face model with safetensors weights"
        )
    return directory


def model_name(directory: Path) -> str:
    """Name the model in a directory as clients call it: the name it was fetched by, or the directory's."""
    origin = directory / ORIGIN_FILE
    if origin.is_file():
        return str(json.loads(origin.read_text())["name"])
    cache_entry = directory.parent.parent.name  # the hub's cache: models--ORG--NAME/snapshots/COMMIT
    if directory.parent.name == "snapshots" and cache_entry.startswith("models--"):
        return cache_entry.rsplit("--", 1)[-1]
    return directory.name


def model_revision(directory: Path) -> str:
    """Identify the weights, 16 hex digits: equal for the same files wherever they lie.

    A digest of the configuration and, of every weight file, its size and 64 KiB at each of 64 evenly spaced
    places from its first byte to its last: to read all of a 100 GB model at each start would take minutes. Other
    weights differ there, too; it is no guard against somebody who means to deceive.
    """
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for sample in range(_REVISION_SAMPLES):
                file.seek(max(0, size - _REVISION_SAMPLE_BYTES) * sample // (_REVISION_SAMPLES - 1))
                digest.update(file.read(_REVISION_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
