"""Traffic on a mesh of emulated instances in which everything happens that a trace can show.

Each step is a plain function of a mesh; a step that needs luck tries again, a bounded number of times.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import grpc.aio

from starmesh.emulation.requests import emulated_prompt, emulated_request
from starmesh.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc, sequence_pb2
from tests.mesh.moves import Moves
from tests.mesh.processes import Mesh, until
from tests.mesh.streams import Answer, generate, generate_all

SECRET = "zanzibar-lantern"
"""In prompts, and in nothing that a service writes."""
# Steps of 24 ms, slow enough for a busy machine; KV memory for 12,000 tokens.
EMULATED = ("--engine", "emulated", "--profile", "h100-7b", "--kv-tokens", "12000", "--speed", "0.25")
DECODE = (*EMULATED, "--transfer", "stream")
ROUTER = (*EMULATED, "--dispatch-policy", "predicted_load", "--predictor-timeout-s", "5", "--queue-timeout-s", "2")
LONG_TOKENS = 400
LONGER_TOKENS = 2000
"""Of requests that must still run when others have begun: they are cancelled."""
_TRIES = 5


async def start(mesh: Mesh) -> None:
    """Two decode instances, and a predictor that is told the truth."""
    await mesh.start_all(prefill=1, decode=2, flags=DECODE, router_flags=ROUTER)
    await mesh.start_predictor(*EMULATED, "--predictor", "oracle")


async def answered(mesh: Mesh) -> None:
    """Text and chat, with all that a client may set, and over the stream for many requests."""
    stub = mesh.inference()
    sampling = sequence_pb2.SamplingParams(
        max_output_tokens=200, temperature=0.5, top_p=0.9, top_k=40, seed=7, stop_strings=[SECRET]
    )
    prompt = emulated_prompt(500, 60, note=SECRET)
    text = inference_pb2.GenerateRequest(request_id="text", text=prompt, sampling=sampling)
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content=prompt)])
    await generate_all(stub, [text, inference_pb2.GenerateRequest(request_id="chat", chat=chat)])


async def refused(mesh: Mesh) -> None:
    """For what is asked, for its id, for its length, and because no instance has room in time."""
    stub = mesh.inference()
    hot = inference_pb2.GenerateRequest(
        request_id="hot", text=SECRET, sampling=sequence_pb2.SamplingParams(temperature=9)
    )
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    await _refused(stub, hot, invalid)
    await _refused(stub, inference_pb2.GenerateRequest(request_id=f"{SECRET} is no id", text=SECRET), invalid)
    await _refused(stub, inference_pb2.GenerateRequest(request_id="huge", text=emulated_prompt(12_500, 1)), invalid)
    large = [emulated_request(7000, LONGER_TOKENS, request_id=f"large-{number}") for number in range(3)]
    async with _running(mesh, large[0]) as first, _running(mesh, large[1]) as second:
        await _refused(stub, large[2], grpc.StatusCode.RESOURCE_EXHAUSTED)
        first.cancel()
        second.cancel()


async def _refused(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, message: inference_pb2.GenerateRequest, code: grpc.StatusCode
) -> None:
    try:
        await generate(stub, message, timeout_s=60.0)
    except grpc.aio.AioRpcError as error:
        assert error.code() is code, error
    else:
        raise AssertionError(f"{message.request_id} was answered")


async def cancelled(mesh: Mesh) -> None:
    """By its client's going away, and by its id."""
    stub = mesh.inference()
    async with _running(mesh, emulated_request(20, LONGER_TOKENS, request_id="left")) as running:
        running.cancel()
    async with _running(mesh, emulated_request(20, LONGER_TOKENS, request_id="cancelled")) as running:
        await stub.Cancel(inference_pb2.CancelRequest(request_id="cancelled"), timeout=10)
        assert (await running).finish_reason == sequence_pb2.FINISH_REASON_CANCELLED


async def chosen_anew(mesh: Mesh) -> None:
    """A prediction sends a request elsewhere: where there is more load now, but less soon. Looked at over the 512 steps
    of a first choice the one that ends soon still weighs more, over the 2,048 of a second one no more."""

    async def predicted() -> bool:
        loads = [sequence for instance in await mesh.instances() for sequence in instance.load.sequences]
        return len(loads) == 2 and all(load.HasField("remaining_tokens") for load in loads)

    for number in range(_TRIES):
        ends_soon = emulated_request(6000, 1200, request_id=f"ends-soon-{number}")
        goes_on = emulated_request(3000, 6000, request_id=f"goes-on-{number}")
        chosen = emulated_request(10, 4000, request_id=f"chosen-{number}")
        async with _running(mesh, goes_on) as first, _running(mesh, ends_soon) as second:
            with contextlib.suppress(AssertionError):
                await until(predicted, "predictions of both", 10)
            async with _running(mesh, chosen) as third:
                owners = await mesh.owners()
                for task in (first, second, third):
                    task.cancel()
        await mesh.settled()
        if owners[chosen.request_id] == owners.get(ends_soon.request_id):
            return
    raise AssertionError(f"the prediction changed nothing in {_TRIES} tries")


async def moved(mesh: Mesh) -> None:
    """By an operator; and not moved to an instance that is too small, which comes later: with it nobody takes a request
    of that length."""
    moves = Moves(mesh, random.Random(1))
    async with _running(mesh, emulated_request(1000, 8000, request_id="moved")) as running:
        source = (await mesh.owners())["moved"]
        await moves.until_moved("moved", {"decode-0": "decode-1", "decode-1": "decode-0"}[source])
        small = await mesh.start("decode", "small", *DECODE, "--kv-tokens", "640")
        await mesh.all_seen(6)
        assert await moves.move("moved", "small") == "STAYED"
        running.cancel()
    small.terminate()
    assert await small.process.wait() == 0


async def moved_once(mesh: Mesh) -> None:
    """By an operator, after a while."""
    async with _running(mesh, emulated_request(2000, 200, request_id="moved-once")) as running:
        source = (await mesh.owners())["moved-once"]
        target = {"decode-0": "decode-1", "decode-1": "decode-0"}[source]
        await Moves(mesh, random.Random(1)).until_moved("moved-once", target)
        await running


async def recovered(mesh: Mesh) -> None:
    """The instance that has it dies."""
    async with _running(mesh, emulated_request(100, LONG_TOKENS, request_id="recovered")) as running:
        owner = (await mesh.owners())["recovered"]
        mesh.services[owner].kill()
        answer = await running
        assert answer.usage is not None and answer.usage.recoveries == 1
    await mesh.services[owner].process.wait()


async def drained(mesh: Mesh) -> None:
    """The instance that has it drains, to one that has just come."""
    await mesh.start("decode", "decode-2", *DECODE)
    async with _running(mesh, emulated_request(100, LONG_TOKENS, request_id="drained")) as running:
        source = (await mesh.owners())["drained"]

        async def another() -> bool:
            ids = {instance.instance_id for instance in await mesh.instances()}
            return any(name.startswith("decode") for name in ids - {source})

        await until(another, "somewhere to go")
        order = cluster_pb2.DrainRequest(instance_id=source)
        for _ in range(2):  # it is in the ledger before the first one is answered
            await mesh.cluster().Drain(order, timeout=10)
        answer = await running
        assert answer.usage is not None and answer.usage.migrations == 1
    mesh.services[source].terminate()
    assert await mesh.services[source].process.wait() == 0


async def rescheduled(mesh: Mesh) -> None:
    """One instance has all; another comes, and the rescheduler moves one there. Without hysteresis: two sequences on an
    H100 hardly slow each other down, and a default rescheduler would rightly leave them."""
    await mesh.start("rescheduler", "rescheduler", *EMULATED, "--round-interval-s", "0.2", "--hysteresis", "0")
    async with (
        _running(mesh, emulated_request(100, 5700, request_id="long-0")) as first,
        _running(mesh, emulated_request(100, 5700, request_id="long-1")) as second,
    ):
        await mesh.start("decode", "decode-3", *DECODE)

        async def arrived() -> int:
            instances = await mesh.instances()
            return sum(i.load.migrated_sequences for i in instances if i.instance_id == "decode-3")

        await until(arrived, "a move to the newcomer", 120)
        first.cancel()
        second.cancel()


@contextlib.asynccontextmanager
async def _running(mesh: Mesh, message: inference_pb2.GenerateRequest) -> AsyncIterator[asyncio.Task[Answer]]:
    """A request that decodes, within the context: it has more than its first token."""
    begun = asyncio.Event()
    task = asyncio.create_task(
        generate(mesh.inference(), message, on_token=lambda tokens: begun.set() if tokens > 20 else None)
    )
    try:
        async with asyncio.timeout(60):
            waiting = asyncio.create_task(begun.wait())
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        yield task
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        task.cancel()


STEPS = (answered, refused, cancelled, chosen_anew, moved, recovered, drained, rescheduled)
"""In this order: what a step leaves up is what the next one begins with."""
