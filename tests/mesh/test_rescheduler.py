"""Rescheduler processes on a real Redis: one of two acts, and when it dies by kill -9 the other does (the decode
instances are peers in this process); and one that moves requests between real engines."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.rescheduler.replay import replay
from starmesh.ledger.redis import RedisLedger
from starmesh.telemetry import names
from starmesh.types import Leadership, Role
from tests.mesh.otlp import Receiver
from tests.mesh.processes import NOBODY_DIES, Mesh, Service, until
from tests.mesh.streams import cancel, generate_all, request
from tests.policy.decoding import sequence
from tests.rescheduler.peers import Peer

# Longer than a busy machine leaves a leader alone: nobody else may lead before it is dead.
LEASE_S = 5.0
LONG_TOKENS = 1900
SEQUENCES = tuple(sequence(f"s{number}", 400) for number in range(12))


async def test_a_standby_takes_over_from_a_leader_that_was_killed(tmp_path: Path) -> None:
    async with Receiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        async with Mesh(tmp_path, tmp_path, environment) as mesh:
            assert mesh.server is not None
            ledger = RedisLedger.connect(mesh.server.url, timeout_s=10.0)
            try:
                async with Peer(ledger, "d0") as d0, Peer(ledger, "d1") as d1:
                    await d0.report(*SEQUENCES)
                    await d1.report()
                    await take_turns(mesh, ledger, receiver, d0)
            finally:
                await ledger.close()


async def test_requests_move_to_an_instance_that_comes_later(tiny_model_dir: Path, tmp_path: Path) -> None:
    async with Receiver() as receiver:
        exported = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        async with Mesh(tmp_path, tiny_model_dir, exported | NOBODY_DIES, forked=True) as mesh:
            await long_requests_move(mesh)
            await moves_link_to_their_rounds(receiver)


async def long_requests_move(mesh: Mesh) -> None:
    flags = ("--kv-memory-mib", "64")
    await mesh.start_all(prefill=1, decode=1, flags=flags)
    rescheduler = await start(mesh, "rescheduler")
    messages = [request(f"Tell story {number}.", max_output_tokens=LONG_TOKENS, ignore_eos=True) for number in range(6)]
    for number, message in enumerate(messages):
        message.request_id = f"story-{number}"
    tokens = 0

    def on_token(count: int) -> None:
        nonlocal tokens
        tokens = count

    running = asyncio.create_task(generate_all(mesh.inference(), messages, on_token=on_token))
    await until(lambda: tokens > 20, "tokens")
    # It finds them all on the other.
    await mesh.start("decode", "decode-1", *flags)

    async def arrived() -> int:
        return sum(instance.load.migrated_sequences for instance in await mesh.instances())

    await until(arrived, "a report of a sequence that moved", describe=rescheduler.log.read_text)
    wanted = tokens + 20 * len(messages)
    await until(lambda: tokens >= wanted or running.done(), "more tokens")
    await cancel(mesh.inference(), messages)
    usages = [answer.usage for answer in await running if answer.usage is not None]
    assert any(usage.migrations for usage in usages) and not any(usage.recoveries for usage in usages)
    await mesh.settled()
    rescheduler.terminate()
    assert await rescheduler.process.wait() == 0
    found = replay(mesh.directory / "rescheduler.rounds")
    assert found.difference == "" and found.migrations >= 1


async def moves_link_to_their_rounds(receiver: Receiver) -> None:
    """A move is in the trace of its request, and linked to the trace of the round that decided it."""

    def linked() -> bool:
        traces = {trace_id: {span.name for span in spans} for trace_id, spans in list(receiver.traces.items())}
        moves = [
            (trace_id, span.links)
            for trace_id, spans in list(receiver.traces.items())
            for span in spans
            if span.name == names.SPAN_MIGRATION_SOURCE
        ]
        return any(
            names.SPAN_GENERATE in traces[trace_id] and names.SPAN_ROUND in traces.get(link, ())
            for trace_id, links in moves
            for link in links
        )

    await until(linked, "a move linked to its round")


async def take_turns(mesh: Mesh, ledger: RedisLedger, receiver: Receiver, source: Peer) -> None:
    first = await start(mesh, "r0")
    await until(lambda: source.asked, "the first command", describe=first.log.read_text)
    second = await start(mesh, "r1")
    led = await ledger.leader(Role.RESCHEDULER)
    assert led == Leadership("r0", source.newest_term)

    first.kill()
    await until(lambda: source.newest_term > led.term, "a command of the other", describe=second.log.read_text)
    assert await ledger.leader(Role.RESCHEDULER) == Leadership("r1", source.newest_term)
    terms = [request.leader_term for request in source.asked]
    assert terms == sorted(terms) and set(terms) == {led.term, source.newest_term}

    # The round that decided a move is a trace of its own, and what the source is told to link to.
    trace_id = bytes.fromhex(source.asked[-1].traceparent.split("-")[1])
    await until(lambda: any(not span.parent_id for span in receiver.traces[trace_id]), "the round's trace")
    (span,) = [span for span in receiver.traces[trace_id] if not span.parent_id]
    assert (span.service, span.name) == ("starmesh-rescheduler", names.SPAN_ROUND)
    assert span.attributes[names.LEADER_TERM] == source.newest_term
    assert span.attributes[names.RESCHEDULING_POLICY] == "star"
    assert span.attributes[names.INSTANCES] == 2
    assert int(str(span.attributes[names.MIGRATIONS])) >= 1

    second.terminate()
    assert await second.process.wait() == 0
    assert await ledger.leader(Role.RESCHEDULER) is None
    for name in ("r0", "r1"):
        found = replay(mesh.directory / f"{name}.rounds")
        assert found.difference == "" and found.migrations >= 1


async def start(mesh: Mesh, name: str) -> Service:
    # The peers report by hand, so no report is ever too old.
    flags = {
        "--policy": "star",
        "--round-interval-s": "0.2",
        "--lease-ttl-s": f"{LEASE_S}",
        "--stale-after-s": "3600",
        "--record": f"{mesh.directory / name}.rounds",
    }
    return await mesh.start("rescheduler", name, *(part for flag in flags.items() for part in flag))
