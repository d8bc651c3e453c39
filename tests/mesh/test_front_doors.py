"""The real model behind all of the front doors: HTTP says what gRPC says, and an answer goes on at another router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai

from starmesh.client import Client, Piece
from starmesh.v1 import inference_pb2, sequence_pb2
from tests.mesh.processes import Mesh, Service
from tests.mesh.streams import Answer, generate, request
from tests.mesh.test_http import HTTP, url_of

# What a dead router has in the ledger goes soon.
BRIEF = ("--owner-ttl-s", "3", "--reservation-ttl-s", "3")
FLAGS = ("--kv-memory-mib", "64")
TEXT = "Once upon a time"
TOKENS = 24
LONG_TOKENS = 60
KILL_AT = 20


async def test_one_answer_through_every_door(model_dir: Path, tmp_path: Path) -> None:
    async with Mesh(tmp_path, model_dir, forked=True) as mesh:
        await mesh.start_all(prefill=1, decode=1, flags=FLAGS, router_flags=(*HTTP, *BRIEF))
        async with openai.AsyncOpenAI(
            base_url=f"{url_of(mesh)}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            await _a_chat_completion_is_that_of_grpc(mesh, client)
            await _so_is_a_text_completion(mesh, client)
        await mesh.settled()
        await _an_answer_goes_on_at_another_router(mesh, await mesh.start("router", "router-1", *BRIEF))
        await mesh.settled()


async def _a_chat_completion_is_that_of_grpc(mesh: Mesh, client: openai.AsyncOpenAI) -> None:
    """Greedy, streamed."""
    expected = await generate(mesh.inference(), request(TEXT, seed=7, max_output_tokens=TOKENS, ignore_eos=True))
    messages: Any = [{"role": "user", "content": TEXT}]
    stream: Any = await client.chat.completions.create(
        model="",
        messages=messages,
        max_tokens=TOKENS,
        temperature=0,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, reason, usage = "", None, None
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    _check(expected, text, reason, usage)


async def _so_is_a_text_completion(mesh: Mesh, client: openai.AsyncOpenAI) -> None:
    """Drawn by a seed, whole."""
    expected = await generate(mesh.inference(), _continuation(seed=11, tokens=TOKENS))
    whole = await client.completions.create(
        model="", prompt=TEXT, max_tokens=TOKENS, temperature=1, seed=11, extra_body={"ignore_eos": True}
    )
    _check(expected, whole.choices[0].text, whole.choices[0].finish_reason, whole.usage)


async def _an_answer_goes_on_at_another_router(mesh: Mesh, other: Service) -> None:
    """One of two routers dies under a stream: the tokens are those of a single one, drawn by the same seed."""
    expected = await generate(mesh.inference(), _continuation(seed=13, tokens=LONG_TOKENS))
    async with Client([mesh.services["router"].address, other.address], timeout_s=120) as client:
        turns = 0
        while other.process.returncode is None:  # the first or the second stream begins there
            turns += 1
            request_id = f"long-{turns}"
            stream = client.generate(
                TEXT, request_id=request_id, temperature=1.0, seed=13, max_output_tokens=LONG_TOKENS, ignore_eos=True
            )
            pieces: list[Piece] = []
            async for piece in stream:
                pieces.append(piece)
                if piece.offset >= KILL_AT and other.address in repr(stream):
                    other.kill()
                    await other.process.wait()
            assert stream.token_ids == tuple(expected.token_ids)
            assert "".join(piece.text for piece in pieces) == expected.text
        assert turns <= 2
        assert stream.request_id != request_id


def _continuation(*, seed: int, tokens: int) -> inference_pb2.GenerateRequest:
    sampling = sequence_pb2.SamplingParams(temperature=1.0, seed=seed, max_output_tokens=tokens, ignore_eos=True)
    return inference_pb2.GenerateRequest(text=TEXT, sampling=sampling)


def _check(expected: Answer, text: str, reason: str | None, usage: Any) -> None:
    assert expected.text.strip()
    assert (text, reason) == (expected.text, "length")
    assert expected.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.usage.prompt_tokens, TOKENS)
