"""The live page of a real cluster in a real browser: its instances, a sequence that moves, and the round that moved it.

With STARMESH_SCREENSHOT a picture is left at that path.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from playwright.async_api import expect

from starmesh.emulation.requests import emulated_request
from tests.browser import WAIT_MS, visit
from tests.mesh.processes import Mesh
from tests.mesh.streams import generate_all

# Slow enough to be looked at, also where starting the browser and two instances takes minutes.
EMULATED = ("--engine", "emulated", "--profile", "h100-7b", "--kv-tokens", "120000", "--speed", "0.25")
ROUTER = (*EMULATED, "--http-listen", "127.0.0.1:0")
OUTPUT_TOKENS = 12_000


def http_origin(mesh: Mesh) -> str:
    """Where the router's HTTP is, by its log."""
    (line,) = (line for line in mesh.services["router"].log.read_text().splitlines() if "HTTP on " in line)
    return line.partition("HTTP on ")[2].strip()


async def test_an_operator_sees_a_sequence_move_and_why(tmp_path: Path) -> None:
    async with Mesh(tmp_path, tmp_path) as mesh:
        await mesh.start_all(prefill=1, decode=1, flags=(*EMULATED, "--transfer", "stream"), router_flags=ROUTER)
        await mesh.start_predictor(*EMULATED, "--predictor", "oracle")
        await mesh.start("rescheduler", "rescheduler-0", *EMULATED, "--round-interval-s", "0.5")
        messages = [
            emulated_request(300 + 120 * number, OUTPUT_TOKENS - 350 * number, request_id=f"chat-{number}")
            for number in range(9)
        ]
        running = asyncio.create_task(generate_all(mesh.inference(), messages))
        origin = http_origin(mesh)
        async with visit(f"{origin}/live") as seen:
            page = seen.page
            await page.wait_for_selector("[data-instance=decode-0] .block")
            # All are at one instance; what comes now has room, and a round sees it.
            await asyncio.gather(
                *(mesh.start("decode", f"decode-{number}", *EMULATED, "--transfer", "stream") for number in (1, 2))
            )
            for number in (1, 2):
                await page.wait_for_selector(f"[data-instance=decode-{number}]")
            await page.wait_for_selector("[data-instance=decode-1] .block, [data-instance=decode-2] .block")
            assert await page.locator(".lane").count() == 3
            for name in ("prefill-0", "predictor-0", "rescheduler-0"):
                await expect(page.locator("#others .name", has_text=name)).to_have_count(1, timeout=WAIT_MS)
            # The move, as the router has seen its stream go over, and the round that planned it, by the rescheduler.
            # Newer ones come on top of them meanwhile, also moves from decode-1 to decode-2.
            moves = page.locator("#moves-list li", has_text="chat-").filter(has_text="gap")
            await moves.filter(has_text="decode-0 →").first.wait_for()
            await page.locator("#rounds-list li", has_text="spread").filter(has_text="chat-").first.wait_for()
            await expect(page.locator("#cards dd").first).to_contain_text("s", timeout=WAIT_MS)
            if picture := os.environ.get("STARMESH_SCREENSHOT"):
                await page.locator("#moves-list li").nth(2).wait_for()
                await page.screenshot(path=picture)
            seen.check(origin)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
