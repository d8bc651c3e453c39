"""Models from the Hugging Face hub, kept in the hub's own cache.

Owns the bounded question whether the hub can be reached. A machine without a route to it, or with a firewall
that drops packets, gets an answer within ``REACH_TIMEOUT_S``.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

from starmesh.model_files.directory import ModelNotFound, check_model

REACH_TIMEOUT_S: Final = 5.0

# What serving needs, at the top of the repository: no pickled weights, no copies in other formats.
WANTED = ("*.json", "*.safetensors", "chat_template.jinja")
UNWANTED = ("*/*", "consolidated*")


def cached_snapshot(hub_id: str) -> Path | None:
    """The model in the hub's cache on this machine, or None when it is not there in full."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return check_model(Path(snapshot_download(hub_id, local_files_only=True)))
    except (LocalEntryNotFoundError, ModelNotFound):
        return None


def reachable_commit(hub_id: str) -> str | None:
    """The commit that the hub has for the model now, or None when it gives none within ``REACH_TIMEOUT_S``.

    The question runs in a thread of its own, since the look-up of a host name takes no timeout.
    """
    from huggingface_hub import HfApi

    answer: list[str | None] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(hub_id, timeout=REACH_TIMEOUT_S).sha)
        except Exception:  # whatever the reason (no route, no certificate, no such model): no commit
            answer.append(None)

    thread = threading.Thread(target=ask, name="hub-question", daemon=True)
    thread.start()
    thread.join(REACH_TIMEOUT_S)
    return answer[0] if answer else None


def download_snapshot(hub_id: str, commit: str) -> Path:
    """Download what serving needs of one commit. Raises ModelNotFound when that fails or is not a model."""
    from huggingface_hub import snapshot_download

    try:
        return check_model(
            Path(
                snapshot_download(
                    hub_id,
                    revision=commit,
                    allow_patterns=list(WANTED),
                    ignore_patterns=list(UNWANTED),
                )
            )
        )
    except ModelNotFound:
        raise
    except Exception as error:
        raise ModelNotFound(
            f"the download of {hub_id} from the hub failed ({error}); try again: what arrived is kept"
        ) from error


def offline() -> bool:
    """Whether the environment forbids the network (``STARMESH_OFFLINE`` or ``HF_HUB_OFFLINE``)."""
    return any(
        os.environ.get(name, "").lower() in ("1", "on", "yes", "true")
        for name in ("STARMESH_OFFLINE", "HF_HUB_OFFLINE")
    )
