"""The router with real instances, whose "KV" is checked at every step: requests move at an operator's word, several
times each and all at once, and each token is that of an undisturbed run."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack

import grpc
import grpc.aio

from services.decode.servicer import DecodeServicer
from services.decode.worker import DecodeWorker
from services.prefill.servicer import PrefillServicer
from services.prefill.worker import PrefillWorker
from starmesh.instance.instance import Instance
from starmesh.types import Role
from starmesh.v1 import (
    cluster_pb2,
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    sequence_pb2,
)
from tests.decode.cluster import PacedExecutor
from tests.engine.checking_executor import reference_tokens
from tests.instance.running import MemoryExecutor, Running, running_instance
from tests.router.conftest import Mesh, SwitchableLedger

TIMEOUT_S = 120.0
REQUESTS = 8
OUTPUT_TOKENS = 400
MOVERS = 3
ENOUGH_MOVES = 20
"""Then steps need take no time: how long a move takes is the machine's matter."""


def serving_prefill(instance: Instance) -> PrefillWorker:
    worker = PrefillWorker(instance)
    servicer = PrefillServicer(worker, instance.instance_id)
    name = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name
    instance.server.add(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, servicer, name)
    return worker


def serving_decode(instance: Instance) -> DecodeWorker:
    worker = DecodeWorker(instance)
    servicer = DecodeServicer(worker, max_timeout_s=TIMEOUT_S)
    name = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name
    instance.server.add(decode_pb2_grpc.add_DecodeServiceServicer_to_server, servicer, name)
    return worker


async def generate(mesh: Mesh, number: int) -> inference_pb2.Usage:
    """Generate one answer and demand its tokens."""
    prompt = [1 + (number + index) % 22 for index in range(5 + number)]
    request = inference_pb2.GenerateRequest(
        request_id=f"r{number}",
        token_ids=inference_pb2.TokenIds(token_ids=prompt),
        sampling=sequence_pb2.SamplingParams(max_output_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True),
    )
    token_ids: list[int] = []
    usage = inference_pb2.Usage()
    async for message in mesh.inference.Generate(request, timeout=TIMEOUT_S):
        assert message.offset == len(token_ids)
        token_ids += message.token_ids
        usage = message.usage
    assert token_ids == reference_tokens(prompt, OUTPUT_TOKENS)
    return usage


async def move(mesh: Mesh, request_id: str, target: str) -> tuple[str, str]:
    """Ask for a move. Returns how it ended, and its reservation's id, of which two askers may hear."""
    request = cluster_pb2.MigrateSequenceRequest(request_id=request_id, target_instance_id=target)
    last = decode_pb2.MigrateResponse()
    try:
        async for response in mesh.cluster.MigrateSequence(request, timeout=TIMEOUT_S):
            last = response.progress
    except grpc.aio.AioRpcError as error:
        return error.code().name, ""
    return decode_pb2.MigrationStage.Name(last.stage).removeprefix("MIGRATION_STAGE_"), last.reservation_id


async def test_requests_move_between_real_instances() -> None:
    draw = random.Random(7)
    ledger = SwitchableLedger()
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(
            running_instance(Role.PREFILL, ledger, serving_prefill, executor=MemoryExecutor(1024))
        )
        executors = [PacedExecutor(1024) for _ in range(3)]
        decodes: list[Running] = [
            await stack.enter_async_context(
                running_instance(Role.DECODE, ledger, serving_decode, executor=executor, instance_id=f"decode-{number}")
            )
            for number, executor in enumerate(executors)
        ]
        mesh = Mesh(stack, ledger)
        await mesh.start(prefills=0, decodes=0)
        await mesh.process.watch.ready.wait()
        answers = [asyncio.create_task(generate(mesh, number)) for number in range(REQUESTS)]
        ends = Counter[str]()
        moved: set[str] = set()

        async def keep_moving() -> None:
            while not all(answer.done() for answer in answers):
                request_id = f"r{draw.randrange(REQUESTS)}"
                end, reservation_id = await move(mesh, request_id, f"decode-{draw.randrange(3)}")
                ends[end] += 1
                if end == "MOVED":
                    moved.add(reservation_id)
                if len(moved) >= ENOUGH_MOVES:
                    for executor in executors:
                        executor.step_s = 0.0

        await asyncio.gather(*(keep_moving() for _ in range(MOVERS)))
        usages = [await answer for answer in answers]
        print(f"{ends.total()} moves asked for:", ends)
        assert sum(usage.migrations for usage in usages) == len(moved) > MOVERS
        assert all(usage.recoveries == 0 for usage in usages)
        await mesh.nothing_left()
        for running in (prefill, *decodes):
            await running.nothing_left()
