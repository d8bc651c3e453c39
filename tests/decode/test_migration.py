"""Sequences that move between real instances: every token is the reference's, and nothing is left anywhere."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.decode.migration_progress import MAX_FOLLOWERS, MigrationProgress
from starmesh.migration.source_record import SourceState
from starmesh.rpc.status import StatusError
from starmesh.telemetry import names
from starmesh.telemetry.setup import traceparent_of
from starmesh.types import FinishReason, Ownership
from starmesh.v1 import decode_pb2
from tests.decode.cluster import Cluster, Hold, Request, running_cluster
from tests.instance.running import PATIENCE_S, spec

FINAL = (
    decode_pb2.MIGRATION_STAGE_MOVED,
    decode_pb2.MIGRATION_STAGE_STAYED,
    decode_pb2.MIGRATION_STAGE_ENDED,
    decode_pb2.MIGRATION_STAGE_IN_DOUBT,
)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as cluster:
        yield cluster
        await cluster.nothing_left()


async def complete(request: Request) -> None:
    assert await request.ended() is FinishReason.LENGTH
    assert request.stream.token_ids == request.reference
    assert not request.refused


async def test_a_sequence_moves_and_its_tokens_do_not_change(cluster: Cluster) -> None:
    request = await cluster.router.start(spec(limit=400), "A")
    outcome = await cluster.migrate("a", "A", "B").outcome()
    assert outcome.moved
    assert outcome.copied_blocks > 0 and outcome.transfer_bytes > 0 and outcome.frozen_s > 0
    assert await cluster.ledger.owner("a") == Ownership("B", 2)
    await complete(request)
    assert request.owner == Ownership("B", 2)
    assert (await cluster.decode["B"].instance.load()).migrated_sequences == 1


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 40])
async def test_short_sequences_move_too(cluster: Cluster, prompt: int) -> None:
    """Those with no full block have only a tail."""
    request = await cluster.router.start(spec(prompt=prompt, limit=400), "A")
    assert (await cluster.migrate("a", "A", "B").outcome()).moved
    await complete(request)


async def test_a_sequence_moves_back_and_forth(cluster: Cluster) -> None:
    request = await cluster.router.start(spec(limit=900), "A")
    for turn in range(8):
        source, target = ("A", "B") if turn % 2 == 0 else ("B", "A")
        # As soon as its router has come.
        await request.until(lambda source=source: cluster.movable(source))
        assert (await cluster.migrate("a", source, target).outcome()).moved, turn
    await complete(request)
    assert request.owner == Ownership("A", 9)


@pytest.mark.parametrize("seed", range(3))
async def test_sequences_move_at_random(seed: int) -> None:
    """Many at a time, among three instances, also where they are refused."""
    chance = random.Random(seed)
    async with running_cluster("ABC", config={"max_outgoing": 3, "max_incoming": 3}) as cluster:
        requests = [
            await cluster.router.start(spec(name, limit=300, prompt=9 + n), "ABC"[n % 3])
            for n, name in enumerate("abcdef")
        ]
        outcomes: list[MigrationProgress] = []

        def whereabouts(request: Request) -> str:
            """Where it could move from now."""
            name = request.spec.request_id
            return "".join(one for one in "ABC" if name in cluster.movable(one))

        async def wander(request: Request) -> None:
            for _ in range(4):
                await request.until(lambda: request.over or whereabouts(request))
                if request.over:
                    return
                source = whereabouts(request)
                target = chance.choice([other for other in "ABC" if other != source])
                try:
                    outcomes.append(await cluster.migrate(request.spec.request_id, source, target).outcome())
                except StatusError as error:
                    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED

        async with asyncio.timeout(3 * PATIENCE_S), asyncio.TaskGroup() as wanderers:
            for request in requests:
                wanderers.create_task(wander(request))
        for request in requests:
            await complete(request)
        await cluster.nothing_left()
        assert sum(outcome.moved for outcome in outcomes) >= 6, outcomes
        for outcome in outcomes:
            assert outcome.state is not SourceState.IN_DOUBT


# Who asks hears how far it is.


def asking(cluster: Cluster) -> grpc.aio.UnaryStreamCall:
    request = decode_pb2.MigrateRequest(
        request_id="a",
        epoch=1,
        target_instance_id="B",
        target_address=cluster.address("B"),
        reason=decode_pb2.MIGRATION_REASON_OPERATOR,
    )
    return cluster.stub("A").Migrate(request, timeout=PATIENCE_S)


async def rest_of(call: grpc.aio.UnaryStreamCall) -> list[decode_pb2.MigrateResponse]:
    messages = []
    while isinstance(message := await call.read(), decode_pb2.MigrateResponse):
        messages.append(message)
    return messages


async def test_every_follower_hears_every_stage(cluster: Cluster) -> None:
    request = await cluster.router.start(spec(limit=400), "A")
    hold = Hold(cluster.decode["B"].instance, "pull")
    first = asking(cluster)
    assert (await first.read()).stage == decode_pb2.MIGRATION_STAGE_RESERVING
    assert (await first.read()).stage == decode_pb2.MIGRATION_STAGE_COPYING
    late = asking(cluster)
    heard = [await late.read()]  # it is there before the migration goes on
    hold.open.set()
    heard += await rest_of(late)
    stages = [message.stage for message in heard]
    assert stages == sorted(stages) and stages[-1] == decode_pb2.MIGRATION_STAGE_MOVED
    assert set(stages) >= {
        decode_pb2.MIGRATION_STAGE_RESERVING,
        decode_pb2.MIGRATION_STAGE_COPYING,
        decode_pb2.MIGRATION_STAGE_FREEZING,
        decode_pb2.MIGRATION_STAGE_COMMITTING,
    }
    assert await rest_of(first) == heard[2:]
    rounds = [message.rounds for message in heard]
    assert rounds == sorted(rounds) and rounds[-1] >= 1
    copied = [message.copied_blocks for message in heard]
    assert copied == sorted(copied) and copied[1] == 0, "what is on its way is not there"
    last = heard[-1]
    assert last.transfer_bytes >= last.copied_blocks * cluster.decode["A"].instance.layout.block_bytes
    assert last.HasField("frozen_duration") and not heard[0].HasField("frozen_duration")
    assert {message.target_instance_id for message in heard} == {"B"}
    await complete(request)


async def test_a_caller_that_goes_does_not_end_the_migration(cluster: Cluster) -> None:
    request = await cluster.router.start(spec(limit=400), "A")
    hold = Hold(cluster.decode["B"].instance, "pull")
    call = asking(cluster)
    await call.read()
    await hold.until_reached()
    call.cancel()
    migration = cluster.migrate("a", "A", "B")
    assert migration.progress._followers <= 1
    hold.open.set()
    assert (await migration.outcome()).moved
    await complete(request)


async def test_followers_are_bounded(cluster: Cluster) -> None:
    request = await cluster.router.start(spec(limit=400), "A")
    hold = Hold(cluster.decode["B"].instance, "pull")
    calls = [asking(cluster) for _ in range(MAX_FOLLOWERS)]
    for call in calls:
        await call.read()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asking(cluster).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    hold.open.set()
    for call in calls:
        assert (await rest_of(call))[-1].stage in FINAL
    await complete(request)


async def test_the_spans_of_a_move_are_in_the_requests_trace(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("starmesh.telemetry.setup._TRACER", provider.get_tracer("test"))
    client, round_ = (provider.get_tracer("test").start_span(name) for name in ("client", "round"))
    request = await cluster.router.start(spec(limit=400), "A", traceparent=traceparent_of(client))
    assert (await cluster.migrate("a", "A", "B", traceparent=traceparent_of(round_)).outcome()).moved
    await complete(request)
    await cluster.nothing_left()

    spans = exporter.get_finished_spans()
    trace_id = client.get_span_context().trace_id
    assert {span.context.trace_id for span in spans} == {trace_id}
    (source,) = [span for span in spans if span.name == names.SPAN_MIGRATION_SOURCE]
    (target,) = [span for span in spans if span.name == names.SPAN_MIGRATION_TARGET]
    pulls = [span for span in spans if span.name == names.SPAN_TRANSFER]
    left, came = [span for span in spans if span.name == names.SPAN_DECODE]
    assert [link.context.span_id for link in source.links] == [round_.get_span_context().span_id]
    requests = client.get_span_context().span_id
    assert {span.parent.span_id for span in (source, left, came)} == {requests}
    assert target.parent.span_id == source.context.span_id
    assert {pull.parent.span_id for pull in pulls} == {target.context.span_id}
    assert source.attributes[names.MIGRATION_OUTCOME] == "moved"
    assert source.attributes[names.TRANSFER_BYTES] == sum(pull.attributes[names.TRANSFER_BYTES] for pull in pulls)
    assert {pull.attributes[names.TRANSFER_BACKEND] for pull in pulls} == {"stream"}
    assert [event.name for event in left.events] == [names.EVENT_MOVED]
    assert (left.attributes[names.INSTANCE_ID], came.attributes[names.INSTANCE_ID]) == ("A", "B")
    assert left.attributes[names.OUTPUT_TOKENS] < came.attributes[names.OUTPUT_TOKENS] == 400
