"""A cluster without a model: everything but the forward is real, and every stream has the very tokens, as many as its
prompt says, whatever moves or dies."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from starmesh.emulation.requests import emulated_prompt, emulated_request
from starmesh.engine.emulated import EOS_TOKEN_ID, output_token_id
from starmesh.v1 import inference_pb2, sequence_pb2
from tests.mesh.moves import Moves
from tests.mesh.processes import Mesh, until
from tests.mesh.streams import Answer, cancel, generate, generate_all

DECODES = ["decode-0", "decode-1", "decode-2"]
# Steps of 6 ms; KV memory for 12,000 tokens.
EMULATED = ("--engine", "emulated", "--profile", "h100-7b", "--kv-tokens", "12000")
LENGTHS = [(prompt_tokens, 150 + 37 * number) for number, prompt_tokens in enumerate([1, 15, 16, 17, 500, 900] * 2)]
MAX_RUNS = 12
LONG_TOKENS = 1500
STOP = sequence_pb2.FINISH_REASON_STOP


def requests(prefix: str) -> list[inference_pb2.GenerateRequest]:
    """Twelve of known lengths."""
    return [
        emulated_request(prompt_tokens, output_tokens, request_id=f"{prefix}-{number}")
        for number, (prompt_tokens, output_tokens) in enumerate(LENGTHS)
    ]


def expected_token_ids(prompt_tokens: int, output_tokens: int) -> list[int]:
    """The whole output of a request."""
    return [*(output_token_id(prompt_tokens + offset) for offset in range(output_tokens - 1)), EOS_TOKEN_ID]


def check(answers: list[Answer]) -> None:
    for (prompt_tokens, output_tokens), answer in zip(LENGTHS, answers, strict=True):
        assert answer.token_ids == expected_token_ids(prompt_tokens, output_tokens)
        assert answer.finish_reason == STOP
        assert answer.usage is not None and answer.usage.prompt_tokens == prompt_tokens


async def test_streams_are_exact_whatever_moves_or_dies(tmp_path: Path) -> None:
    async with Mesh(tmp_path, tmp_path) as mesh:
        await mesh.start_all(prefill=1, decode=3, flags=(*EMULATED, "--transfer", "stream"), router_flags=EMULATED)
        await text_asks_for_lengths_too(mesh)
        await sequences_move(mesh)
        await an_instance_dies(mesh)
        for name in ("prefill-0", "decode-1", "router"):
            maps = Path(f"/proc/{mesh.services[name].process.pid}/maps").read_text()
            assert "libtorch" not in maps, f"{name} has loaded torch"
        for service in mesh.services.values():
            assert "WrongMark" not in service.log.read_text(), f"{service.name} met a block that is not its sequence's"


async def text_asks_for_lengths_too(mesh: Mesh) -> None:
    stub = mesh.inference()
    answer = await generate(stub, inference_pb2.GenerateRequest(text=emulated_prompt(40, 5)))
    assert answer.token_ids == expected_token_ids(40, 5)
    assert answer.text == " 40 41 42 43"
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="emulate output_tokens=3")])
    assert len((await generate(stub, inference_pb2.GenerateRequest(chat=chat))).token_ids) == 3
    ordinary = inference_pb2.GenerateRequest(
        text="Why is the sky blue?", sampling=sequence_pb2.SamplingParams(max_output_tokens=4, ignore_eos=True)
    )
    cut = await generate(stub, ordinary)
    assert (len(cut.token_ids), cut.finish_reason) == (4, sequence_pb2.FINISH_REASON_LENGTH)


async def sequences_move(mesh: Mesh) -> None:
    """Back and forth at an operator's word, from their first token to their last; again where a busy machine has left
    them too little time for moves."""
    moves = Moves(mesh, random.Random(5))
    stub = mesh.inference()
    runs = 0

    async def moved_about(message: inference_pb2.GenerateRequest) -> Answer:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def wander() -> None:
            await begun.wait()
            await moves.wander(message.request_id, DECODES, ended, pause_s=0.2)

        wandering = asyncio.create_task(wander())
        try:
            return await generate(stub, message, on_token=lambda tokens: begun.set())
        finally:
            begun.set()
            ended.set()
            await wandering

    while moves.count("MOVED") < len(LENGTHS):
        assert runs < MAX_RUNS, (moves.ends, moves.refused)
        check(list(await asyncio.gather(*map(moved_about, requests(f"moved-{runs}")))))
        runs += 1
    assert moves.count("IN_DOUBT") == 0
    await mesh.settled()
    print(f"{moves.count('MOVED')} moves in {runs} runs; {dict(moves.refused)}")


async def an_instance_dies(mesh: Mesh) -> None:
    """kill -9 in mid-stream: its sequences go on elsewhere, recomputed, and end where they should."""
    killed = asyncio.Event()

    def kill(tokens: int) -> None:
        if tokens >= 600 and not killed.is_set():
            killed.set()
            mesh.services["decode-0"].kill()

    answers = await generate_all(mesh.inference(), requests("killed"), on_token=kill)
    assert killed.is_set()
    check(answers)
    assert any(answer.usage is not None and answer.usage.recoveries for answer in answers)
    await mesh.settled()


async def test_the_rescheduler_moves_emulated_sequences(tmp_path: Path) -> None:
    """To an instance that comes when the only other one has them all; by lengths that a predictor tells."""
    # Steps of 24 ms: the streams last longer than an instance takes to start, and are cancelled when one has moved.
    slow = (*EMULATED, "--speed", "0.25")
    async with Mesh(tmp_path, tmp_path) as mesh:
        await mesh.start_all(prefill=1, decode=1, flags=(*slow, "--transfer", "stream"), router_flags=slow)
        await mesh.start_predictor(*slow, "--predictor", "oracle")
        await mesh.start("rescheduler", "rescheduler", *slow, "--round-interval-s", "0.2", "--stale-after-s", "30")
        messages = [emulated_request(100, LONG_TOKENS, request_id=f"long-{number}") for number in range(6)]
        tokens = 0

        def on_token(count: int) -> None:
            nonlocal tokens
            tokens = count

        running = asyncio.create_task(generate_all(mesh.inference(), messages, on_token=on_token))
        await until(lambda: tokens > 20, "tokens")
        await predictions_are_known(mesh)
        await mesh.start("decode", "decode-1", *slow, "--transfer", "stream")

        async def arrived() -> int:
            return sum(instance.load.migrated_sequences for instance in await mesh.instances())

        await until(arrived, "a report of a sequence that moved", describe=mesh.services["rescheduler"].log.read_text)
        wanted = tokens + 20 * len(messages)
        await until(lambda: tokens >= wanted or running.done(), "more tokens")
        await cancel(mesh.inference(), messages)
        answers = await running
        for answer in answers:
            assert answer.token_ids == expected_token_ids(100, LONG_TOKENS)[: len(answer.token_ids)]
        assert any(answer.usage is not None and answer.usage.migrations for answer in answers)
        await mesh.settled()


async def predictions_are_known(mesh: Mesh) -> None:
    """Loads say how many tokens each sequence will generate in all."""
    found: set[int] = set()

    async def all_known() -> bool:
        loads = [sequence for instance in await mesh.instances() for sequence in instance.load.sequences]
        found.clear()
        found.update(load.output_tokens + load.remaining_tokens for load in loads if load.HasField("remaining_tokens"))
        return bool(found)

    await until(all_known, "predictions", describe=lambda: str(found))
    assert found == {LONG_TOKENS}
