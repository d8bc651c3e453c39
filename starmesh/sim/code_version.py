"""Which code simulates: a hash over all source that has a say in what happens in a run.

Owns the list of that source. A cached result counts only for the code that made it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np

SOURCES: Final = (
    "clock.py",
    "lengths.py",
    "types.py",
    "sequence_loads.py",
    "engine",
    "migration",
    "policy",
    "prediction",
    "profiles",
    "sim",
)
"""Files and directories of the package."""

_SUFFIXES = frozenset({".py", ".toml", ".json", ".npz"})
_NO_SAY = frozenset({"report", "sweep.py", "training"})
"""Names below ``SOURCES`` that only read results, or only train."""


@cache
def code_version() -> str:
    """A hash of the source, of Python's version and of numpy's, read once."""
    root = Path(__file__).parent.parent
    digest = hashlib.blake2b(f"{sys.version_info[:2]} {np.__version__}".encode(), digest_size=8)
    for path in _files(root):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    for source in SOURCES:
        path = root / source
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in found:
            if file.suffix in _SUFFIXES and not _NO_SAY & set(file.relative_to(root).parts):
                yield file
