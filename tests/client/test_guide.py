"""The programs in docs/clients.md do what it says."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.router.conftest import TIMEOUT_S, Mesh, text_of, tokens_after

GUIDE = Path(__file__).parents[2] / "docs" / "clients.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
STORY = text_of(tokens_after("Once upon a time", 60))
RIVER = text_of(tokens_after("user:Name a river.;", 20))


@pytest.mark.parametrize(
    ("program", "output"), list(zip(PROGRAMS, [f"{STORY}\n{RIVER}\n", STORY], strict=True)), ids=["asyncio", "threads"]
)
async def test_a_program_of_the_guide(mesh: Mesh, program: str, output: str) -> None:
    await mesh.start()
    assert "127.0.0.1:50051" in program
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program.replace("127.0.0.1:50051", mesh.process.address)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(4 * TIMEOUT_S):  # programs start slowly on a busy machine
        printed, errors = await process.communicate()
    assert (printed.decode(), errors.decode(), process.returncode) == (output, "", 0)
    await mesh.nothing_left()
