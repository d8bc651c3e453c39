"""A mesh of real processes on the tiny model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.mesh.processes import Mesh


@pytest.fixture
async def tiny_mesh(tiny_model_dir: Path, tmp_path: Path) -> AsyncIterator[Mesh]:
    """One prefill, two decode instances and a router on the tiny model."""
    async with Mesh(tmp_path, tiny_model_dir) as mesh:
        await mesh.start_all(flags=("--kv-memory-mib", "16"))
        yield mesh
