"""The HTTP front door of a real router process, with emulated instances: OpenAI's client, and a stop by SIGTERM."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from starmesh.emulation.requests import emulated_prompt
from tests.mesh.processes import Mesh
from tests.mesh.test_emulated import EMULATED

HTTP = ("--http-listen", "127.0.0.1:0")
STREAMS = 8
TOKENS = 300


def url_of(mesh: Mesh) -> str:
    """Where the router says it serves HTTP."""
    found = re.search(r"HTTP on (http://\S+)", mesh.services["router"].log.read_text())
    assert found is not None
    return found[1]


async def test_openais_client_and_a_stop_under_its_streams(tmp_path: Path) -> None:
    async with Mesh(tmp_path, tmp_path) as mesh:
        await mesh.start_all(
            prefill=1,
            decode=2,
            flags=(*EMULATED, "--transfer", "stream"),
            router_flags=(*EMULATED, *HTTP, "--grace-s", "60"),
        )
        router = mesh.services["router"]
        async with (
            openai.AsyncOpenAI(base_url=f"{url_of(mesh)}/v1", api_key="none", max_retries=0, timeout=120) as client,
            httpx2.AsyncClient(timeout=30) as http,
        ):
            model = (await client.models.list()).data[0].id
            expected = "".join(f" {number}" for number in range(40, 40 + TOKENS - 1))
            whole = await client.completions.create(model=model, prompt=emulated_prompt(40, TOKENS), max_tokens=TOKENS)
            assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")

            begun = asyncio.Barrier(STREAMS + 1)

            async def stream() -> str:
                chunks: Any = await client.completions.create(
                    model=model, prompt=emulated_prompt(40, TOKENS), max_tokens=TOKENS, stream=True
                )
                text = ""
                async for chunk in chunks:
                    if not text:
                        await begun.wait()
                    text += chunk.choices[0].text
                return text

            streams = [asyncio.create_task(stream()) for _ in range(STREAMS)]
            await asyncio.wait_for(begun.wait(), 120)
            assert (await http.get(f"{url_of(mesh)}/healthz")).status_code == 200
            # uvicorn must not take the signal: then nothing would drain.
            router.terminate()
            assert await asyncio.gather(*streams) == [expected] * STREAMS
            assert await asyncio.wait_for(router.process.wait(), 180) == 0
            with pytest.raises(httpx2.ConnectError):
                await http.get(f"{url_of(mesh)}/healthz")
        log = router.log.read_text()
        assert "SIGTERM: stopping" in log
        assert "stopped" in log
        assert "Traceback" not in log
        # No access is logged, and nothing of what was said.
        assert "emulate" not in log
