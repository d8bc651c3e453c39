"""Compiles ``native.cpp`` at first use and binds it: the engine's hot loops on a CPU.

Owns the compiler call, the cache of compiled libraries and the C signatures; knows no tensors. Plain C ABI through
ctypes, so a build takes seconds and needs no torch headers, and a call releases the GIL. Without a working compiler
``library`` returns None, and the engine runs on torch alone: slower, and same tokens.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
_COMPILE_TIMEOUT_S = 120.0

_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Step(ctypes.Structure):
    """``struct Step`` of native.cpp, field by field."""

    _fields_ = (
        ("pool", _POINTER),
        ("query_starts", _POINTER),
        ("positions", _POINTER),
        ("table_starts", _POINTER),
        ("tables", _POINTER),
        ("slots", _POINTER),
        ("items", _INT),
        ("layers", _INT),
        ("kv_heads", _INT),
        ("query_heads", _INT),
        ("block_tokens", _INT),
        ("head_dim", _INT),
        ("threads", _INT),
    )


class NativeLibrary:
    """The functions of native.cpp; their contracts stand there. Pointers are plain addresses."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        self.linear = loaded.starmesh_linear
        self.linear.argtypes = (_POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT, _INT, ctypes.c_int32)
        self.linear.restype = None
        self.gated_mlp = loaded.starmesh_gated_mlp
        self.gated_mlp.argtypes = (*(_POINTER,) * 6, _INT, _INT, _INT, ctypes.c_int32, ctypes.c_int32)
        self.gated_mlp.restype = None
        self.rotate = loaded.starmesh_rotate
        self.rotate.argtypes = (_POINTER, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _INT)
        self.rotate.restype = None
        self.rms_norm = loaded.starmesh_rms_norm
        self.rms_norm.argtypes = (_POINTER, _POINTER, _POINTER, _INT, _INT, _FLOAT)
        self.rms_norm.restype = None
        strided = (_POINTER, _INT, _INT)
        self.attention = {}
        for dtype in ("float32", "bfloat16"):
            function = getattr(loaded, f"starmesh_attention_{dtype}")
            function.argtypes = (_POINTER, _INT, *strided, *strided, *strided, _POINTER, _FLOAT, _FLOAT, _INT)
            function.restype = None
            self.attention[dtype] = function
        self.lanes = int(loaded.starmesh_lanes())
        self.columns = int(loaded.starmesh_columns())
        self.max_head_dim = int(loaded.starmesh_max_head_dim())


@cache
def library() -> NativeLibrary | None:
    """The compiled library, built now if this machine has not built this source yet; None (logged) without one."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        logger.warning("no C++ compiler found (install g++ 12 or later): the engine runs on torch alone, slower")
        return None
    try:
        return NativeLibrary(compiled(compiler, cache_directory()))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in output.splitlines() if "error" in line), output.strip())
        logger.warning("%s cannot build the engine's kernels (%s): it runs on torch alone, slower", compiler, reason)
        return None


def cache_directory() -> Path:
    """Where compiled libraries are kept, by the XDG rules."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "starmesh" / "native"


def compiled(compiler: str, directory: Path) -> Path:
    """The library for this source, compiler and processor under ``directory``, compiled there if it is missing.

    Processes that start together may each compile; each renames its own file into place, so that none ever loads half
    a file. Raises OSError or subprocess.SubprocessError when the build fails.
    """
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_TIMEOUT_S
    ).stdout
    digest = hashlib.sha256()
    for part in (_SOURCE.read_bytes(), compiler.encode(), version, " ".join(_FLAGS).encode(), _processor().encode()):
        digest.update(hashlib.sha256(part).digest())
    target = directory / f"native-{digest.hexdigest()[:24]}.so"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        built = Path(scratch) / "native.so"
        command = [compiler, *_FLAGS, "-o", str(built), str(_SOURCE)]
        try:
            _run([*command, "-fopenmp"])
        except subprocess.CalledProcessError:
            _run(command)  # a compiler without OpenMP: one thread
        built.replace(target)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_TIMEOUT_S)


def _processor() -> str:
    """What ``-march=native`` depends on: machine, and the processor's feature flags where Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {features}"
