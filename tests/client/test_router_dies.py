"""kill -9 of real routers under streams of emulated engines: every answer is what it would have been."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from starmesh.client import Client, FinishReason, Piece, RetryPolicy
from starmesh.emulation.requests import emulated_prompt
from starmesh.engine.emulated import EOS_TOKEN_ID, output_token_id
from tests.mesh.processes import Mesh, Service

# Steps of 24 ms: on a busy machine, too, all streams run when the last begins.
EMULATED = ("--engine", "emulated", "--profile", "h100-7b", "--kv-tokens", "12000", "--speed", "0.25")
# What a dead router has in the ledger goes soon.
ROUTER = (*EMULATED, "--owner-ttl-s", "3", "--reservation-ttl-s", "3")
STREAMS = 16
PROMPT_TOKENS = 40
OUTPUT_TOKENS = 300
KILL_AT = 20
# A router may take long to start on a busy machine.
PATIENT = RetryPolicy(max_retries=60, max_delay_s=1.0)


def check(pieces: list[Piece]) -> None:
    """Demand the tokens and the text of an undisturbed run, each once and in order."""
    token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
    positions = range(PROMPT_TOKENS, PROMPT_TOKENS + OUTPUT_TOKENS - 1)
    assert token_ids == [*map(output_token_id, positions), EOS_TOKEN_ID]
    assert "".join(piece.text for piece in pieces) == "".join(f" {position}" for position in positions)
    assert pieces[-1].finish_reason is FinishReason.STOP
    assert pieces[-1].usage is not None
    assert (pieces[-1].usage.prompt_tokens, pieces[-1].usage.output_tokens) == (PROMPT_TOKENS, OUTPUT_TOKENS)


async def stream_all(client: Client, kill: Service) -> set[str]:
    """Run all streams and kill a router when the last is at ``KILL_AT`` tokens. Returns the ids of those that had to
    be begun anew."""
    again: set[str] = set()
    begun: set[int] = set()

    async def one(number: int) -> None:
        request_id = f"{kill.name}-{number}"
        pieces: list[Piece] = []
        stream = client.generate(emulated_prompt(PROMPT_TOKENS, OUTPUT_TOKENS), request_id=request_id)
        async for piece in stream:
            pieces.append(piece)
            if piece.offset >= KILL_AT:
                begun.add(number)
            if len(begun) == STREAMS and kill.process.returncode is None:
                kill.kill()
                await kill.process.wait()
        check(pieces)
        if stream.request_id != request_id:
            again.add(request_id)

    await asyncio.gather(*map(one, range(STREAMS)))
    return again


@pytest.mark.timeout(900)
async def test_answers_outlive_routers(tmp_path: Path) -> None:
    async with Mesh(tmp_path, tmp_path) as mesh:
        await mesh.start_all(prefill=1, decode=2, flags=(*EMULATED, "--transfer", "stream"), router_flags=ROUTER)
        other = await mesh.start("router", "router-1", *ROUTER)
        routers = [mesh.services["router"].address, other.address]
        async with Client(routers, timeout_s=240, retries=PATIENT) as client:
            # Those of the dead router go on at the other, those of the other are not touched.
            assert len(await stream_all(client, other)) == STREAMS // 2
        await mesh.settled()
        # One that is alone is waited for, and goes on with requests that it has never heard of.
        alone = await mesh.start("router", "router-2", *ROUTER)
        async with Client(alone.address, timeout_s=240, retries=PATIENT) as client:
            streams = asyncio.create_task(stream_all(client, alone))
            while alone.process.returncode is None:
                assert not streams.done() or streams.result()
                await asyncio.sleep(0.02)
            await mesh.start("router", "router-2", *ROUTER, "--listen", alone.address)
            assert len(await streams) == STREAMS
        await mesh.settled()
