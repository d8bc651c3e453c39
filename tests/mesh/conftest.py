"""A mesh of real processes on the tiny model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.mesh.processes import NOBODY_DIES, Mesh

TIMEOUT_S = 900
"""Of tests that do not set their own: where a machine is slow, or busy, starting processes alone takes minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture
async def tiny_mesh(tiny_model_dir: Path, tmp_path: Path) -> AsyncIterator[Mesh]:
    """One prefill, two decode instances and a router on the tiny model."""
    async with Mesh(tmp_path, tiny_model_dir, NOBODY_DIES) as mesh:
        await mesh.start_all(flags=("--kv-memory-mib", "16"))
        yield mesh
