"""Live sequences move between decode processes, and nobody notices: every token is that of an undisturbed run."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from starmesh.telemetry import names
from starmesh.v1 import inference_pb2, sequence_pb2
from tests.mesh.moves import Moves
from tests.mesh.otlp import ReceivedSpan, Receiver
from tests.mesh.processes import NOBODY_DIES, Mesh, until
from tests.mesh.prompts import PROMPTS
from tests.mesh.streams import Answer, generate, generate_all, request

DECODES = ["decode-0", "decode-1", "decode-2"]
OUTPUT_TOKENS = 250
LEAST_MOVES = 3
"""Of each sequence, in one of its runs; how many there are beyond that is chance."""
MAX_RUNS = 12
"""A machine that is busy with something else may leave a sequence too little time for its moves: then all run again."""


async def test_sixteen_live_sequences_move_back_and_forth(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Between three processes, two of which reach each other by NIXL and the third by stream only."""
    async with Receiver() as receiver:
        exported = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        async with Mesh(tmp_path, tiny_model_dir, exported | NOBODY_DIES, forked=True) as mesh:
            small = ("--kv-memory-mib", "16")
            await mesh.start("prefill", "prefill-0", *small)
            for name, backends in zip(DECODES, ("nixl,stream", "nixl,stream", "stream"), strict=True):
                await mesh.start("decode", name, *small, "--transfer", backends)
            await mesh.start("router", "router")
            await mesh.all_seen(5)
            await _every_token_is_that_of_an_undisturbed_run(mesh)
            await _both_backends_have_moved_sequences(receiver)
            await _a_trace_shows_a_move(mesh, receiver)


async def test_sequences_of_a_real_model_move(model_dir: Path, tmp_path: Path) -> None:
    """The same with the default model, whose steps take longer than a migration: few moves, each of many blocks."""
    messages = [request(prompt, max_output_tokens=24, ignore_eos=True) for prompt in PROMPTS[:6]]
    for number, message in enumerate(messages):
        message.request_id = f"mover-{number}"
    async with Mesh(tmp_path, model_dir, forked=True) as mesh:
        await mesh.start_all(prefill=1, decode=3, flags=("--kv-memory-mib", "256"))
        undisturbed = await generate_all(mesh.inference(), messages)
        await mesh.settled()
        runs = await _until_moved(mesh, messages, 1)
        for run in runs:
            assert [answer.token_ids for answer in run.answers] == [answer.token_ids for answer in undisturbed]
        moved = sum(run.moves.count("MOVED") for run in runs)
        print(f"{moved} moves of {len(messages)} sequences in {len(runs)} runs")


async def _every_token_is_that_of_an_undisturbed_run(mesh: Mesh) -> None:
    stub = mesh.inference()
    messages = await _sixteen_requests(mesh)
    undisturbed = await generate_all(stub, messages)
    assert {answer.finish_reason for answer in undisturbed} == {
        sequence_pb2.FINISH_REASON_STOP,
        sequence_pb2.FINISH_REASON_LENGTH,
    }
    await mesh.settled()

    runs = await _until_moved(mesh, messages, LEAST_MOVES)
    for run in runs:
        for message, answer, expected in zip(messages, run.answers, undisturbed, strict=True):
            assert answer.token_ids == expected.token_ids, message
            assert answer.text == expected.text
            assert answer.finish_reason == expected.finish_reason
            assert answer.usage is not None
            assert answer.usage.migrations >= run.moved(message) - 1, "the last of them may have crossed the end"
            assert answer.usage.recoveries == 0
        assert run.moves.count("IN_DOUBT") == 0
    moved = sum(run.moves.count("MOVED") for run in runs)
    arrived = [(await mesh.instance(name)).instance.load.migrated_sequences for name in DECODES]
    assert sum(arrived) == moved
    assert all(arrived)
    refused = sum((run.moves.refused for run in runs), Counter[str]())
    print(f"{moved} moves of 16 sequences in {len(runs)} runs, to each instance {arrived}; {dict(refused)}")


async def _sixteen_requests(mesh: Mesh) -> list[inference_pb2.GenerateRequest]:
    """Greedy and sampled ones, half of each with a repetition penalty, half of the sampled with a stop string that
    comes late: all that moves along with a sequence."""
    messages = []
    for number, prompt in enumerate(PROMPTS):
        sampled = {"temperature": 1.0, "top_p": 0.95, "top_k": 200, "seed": number} if number % 4 >= 2 else {}
        penalty = {"repetition_penalty": 1.3} if number % 2 else {}
        message = request(prompt, max_output_tokens=OUTPUT_TOKENS, ignore_eos=True, **sampled, **penalty)
        message.request_id = f"mover-{number}"
        messages.append(message)
    stopped = [message for number, message in enumerate(messages) if number % 8 >= 6]
    for message, answer in zip(stopped, await generate_all(mesh.inference(), stopped), strict=True):
        late = answer.text[len(answer.text) * 3 // 4 :]
        message.sampling.stop_strings.append(late[:12])
    return messages


@dataclass(frozen=True)
class Run:
    """What became of all streams, and of their moves."""

    answers: list[Answer]
    moves: Moves

    def moved(self, message: inference_pb2.GenerateRequest) -> int:
        """How often its sequence has moved."""
        return self.moves.ends.get(message.request_id, Counter())["MOVED"]


async def _until_moved(mesh: Mesh, messages: list[inference_pb2.GenerateRequest], least: int) -> list[Run]:
    """Run the streams until each has had a run in which its sequence moved ``least`` times."""
    runs: list[Run] = []
    while len(runs) < MAX_RUNS:
        moves = Moves(mesh, random.Random(len(runs)))
        runs.append(Run(await _moved_about(mesh, messages, moves, least), moves))
        await mesh.settled()
        most = {message.request_id: max(run.moved(message) for run in runs) for message in messages}
        if min(most.values()) >= least:
            return runs
    raise AssertionError(f"moves of each request, at most, in {MAX_RUNS} runs: {most}; {moves.ends}, {moves.refused}")


async def _moved_about(
    mesh: Mesh, messages: list[inference_pb2.GenerateRequest], moves: Moves, least: int
) -> list[Answer]:
    """Run the streams; each request moves from its first token to its end. Those that have moved ``least`` times let
    the others go first: only so many may move at a time."""
    stub = mesh.inference()
    running = {message.request_id for message in messages}

    def moved(request_id: str) -> int:
        return moves.ends.get(request_id, Counter())["MOVED"]

    def may_move(request_id: str) -> bool:
        return moved(request_id) < least or all(moved(other) >= least for other in running)

    async def disturbed(message: inference_pb2.GenerateRequest) -> Answer:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def wander() -> None:
            await begun.wait()
            await moves.wander(message.request_id, DECODES, ended, may_move=lambda: may_move(message.request_id))

        wandering = asyncio.create_task(wander())
        try:
            return await generate(stub, message, on_token=lambda tokens: begun.set())
        finally:
            running.discard(message.request_id)
            begun.set()
            ended.set()
            await wandering

    return await asyncio.gather(*(disturbed(message) for message in messages))


async def _both_backends_have_moved_sequences(receiver: Receiver) -> None:
    def used() -> Counter[object]:
        spans = [span for spans in list(receiver.traces.values()) for span in spans]
        pulls = [span for span in spans if span.name == names.SPAN_TRANSFER]
        return Counter(span.attributes.get(names.TRANSFER_BACKEND) for span in pulls)

    await until(
        lambda: used()["nixl"] >= 8 and used()["stream"] >= 8, "pulls by both backends", describe=lambda: str(used())
    )
    print(f"pulls of migrations by backend: {dict(used())}")


async def _a_trace_shows_a_move(mesh: Mesh, receiver: Receiver) -> None:
    """Spans of source, target and transfer are in the request's own trace, and linked to the command's."""
    command = "7e57" * 8
    message = request("Count.", max_output_tokens=1900, ignore_eos=True)
    message.request_id = "traced"
    begun = asyncio.Event()
    # Its first token may come from the prefill instance before any decode instance has it.
    running = asyncio.create_task(
        generate(mesh.inference(), message, on_token=lambda tokens: begun.set() if tokens > 2 else None)
    )
    await asyncio.wait_for(begun.wait(), 120)
    source = (await mesh.owners())["traced"]
    target = DECODES[DECODES.index(source) - 1]
    moves = Moves(mesh, random.Random(0))
    assert await moves.move("traced", target, traceparent=f"00-{command}-{'ab' * 8}-01") == "MOVED"
    answer = await running
    assert answer.usage is not None and answer.usage.migrations == 1

    def trace() -> list[ReceivedSpan]:
        for spans in list(receiver.traces.values()):
            generated = [span for span in spans if span.name == names.SPAN_GENERATE]
            if generated and generated[0].attributes.get(names.REQUEST_ID) == "traced":
                return spans
        return []

    def named(name: str) -> list[ReceivedSpan]:
        return [span for span in trace() if span.name == name]

    def complete() -> bool:
        return bool(named(names.SPAN_MIGRATION_SOURCE) and named(names.SPAN_MIGRATION_TARGET))

    await until(complete, "the trace", describe=lambda: str([(s.service, s.name) for s in trace()]))
    (left,), (came,) = named(names.SPAN_MIGRATION_SOURCE), named(names.SPAN_MIGRATION_TARGET)
    pulls = named(names.SPAN_TRANSFER)
    assert left.attributes[names.INSTANCE_ID] == source
    assert left.attributes[names.MIGRATION_OUTCOME] == "moved"
    assert left.links == (bytes.fromhex(command),)
    assert came.attributes[names.INSTANCE_ID] == target
    assert came.parent_id == left.span_id
    assert pulls
    assert all(pull.parent_id == came.span_id for pull in pulls)
    known = {span.span_id for span in trace()}
    assert [span.name for span in trace() if span.parent_id not in known] == [names.SPAN_GENERATE], "one tree"
    (generated,) = named(names.SPAN_GENERATE)
    assert names.EVENT_MOVED in generated.events
