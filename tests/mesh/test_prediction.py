"""Predictions on a mesh of real processes: every running sequence is reported with an estimate that is renewed and
moves along, and a predictor that dies or hangs takes nothing but its estimates away."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

from services.rescheduler.replay import read_rounds, replay
from starmesh.engine.engine import HIDDEN_EVERY_TOKENS
from starmesh.telemetry import names
from starmesh.v1 import inference_pb2
from tests.mesh.moves import Moves
from tests.mesh.otlp import Receiver
from tests.mesh.processes import Mesh, until
from tests.mesh.prompts import PROMPTS
from tests.mesh.sightings import sightings, sightings_at
from tests.mesh.streams import Answer, cancel, generate_all, request

FLAGS = ("--kv-memory-mib", "16")
RENEWALS = 4
OLD = 3 * HIDDEN_EVERY_TOKENS
STREAMS_SEEN = 12
"""Of sixteen, at the least: a report may be from before the last began."""


@contextlib.asynccontextmanager
async def running_streams(
    mesh: Mesh, messages: list[inference_pb2.GenerateRequest]
) -> AsyncIterator[asyncio.Task[list[Answer]]]:
    """Streams that run meanwhile; the clients of those that have not ended go away at the end."""
    running = asyncio.create_task(generate_all(mesh.inference(), messages))
    try:
        yield running
    finally:
        running.cancel()
        await asyncio.wait([running])


def long_requests(name: str, count: int) -> list[inference_pb2.GenerateRequest]:
    """Requests that nothing ends for long."""
    messages = [request(prompt, max_output_tokens=1900) for prompt in PROMPTS[:count]]
    for number, message in enumerate(messages):
        message.request_id = f"{name}-{number}"
    return messages


async def test_estimates_are_reported_renewed_and_used(tiny_model_dir: Path, tmp_path: Path) -> None:
    async with Receiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        async with Mesh(tmp_path, tiny_model_dir, environment, forked=True) as mesh:
            patient = ("--dispatch-policy", "predicted_load", "--predictor-timeout-s", "10")
            await mesh.start_all(decode=2, flags=FLAGS, router_flags=patient)
            await mesh.start_predictor()
            async with running_streams(mesh, long_requests("seen", 8)) as running:
                await _reports_carry_estimates(mesh)
                await _an_estimate_moves_along(mesh)
                await _rounds_see_estimates(mesh)
                assert not running.done(), "the streams have ended too early to show anything"
            await _dispatch_had_estimates(receiver, 8)
            await mesh.settled()


async def _reports_carry_estimates(mesh: Mesh) -> None:
    """Each sequence's estimate is renewed again and again, at multiples of the interval, and ages in between."""
    renewals: dict[str, set[int]] = defaultdict(set)
    oldest = 0

    async def renewed() -> bool:
        nonlocal oldest
        for seen in (await sightings(mesh)).values():
            if seen.sampled_at is not None:
                assert seen.remaining is not None and seen.upper is not None and seen.age is not None
                assert 0 <= seen.remaining <= seen.upper
                renewals[seen.request_id].add(seen.sampled_at)
                oldest = max(oldest, seen.age)
        return len(renewals) == 8 and all(len(found) >= RENEWALS for found in renewals.values())

    await until(renewed, "estimates to be renewed", 120, lambda: str(dict(renewals)))
    positions = set().union(*renewals.values())
    assert all(position % HIDDEN_EVERY_TOKENS == 0 for position in positions), sorted(positions)
    # None is forgotten: there comes a time at which all are new. How old they get in between is the machine's matter.
    await until(lambda: _all_younger(mesh, OLD, 8), "new estimates of all at once")
    print(f"{sum(map(len, renewals.values()))} estimates seen of 8 sequences, none older than {oldest} tokens")


async def _an_estimate_moves_along(mesh: Mesh) -> None:
    """With the predictor stopped, what the target knows can only have come with the sequence."""
    predictor = mesh.services["predictor-0"].process
    predictor.send_signal(signal.SIGSTOP)
    await until(lambda: _all_older(mesh, OLD), "estimates to age")
    seen = next(iter((await sightings(mesh)).values()))
    target = "decode-1" if seen.instance_id == "decode-0" else "decode-0"
    await Moves(mesh, random.Random(0)).until_moved(seen.request_id, target)
    moved = (await sightings_at(mesh, target))[seen.request_id]
    assert moved.sampled_at == seen.sampled_at
    assert moved.remaining is not None and seen.remaining is not None
    assert moved.remaining == max(0, seen.remaining - (moved.output_tokens - seen.output_tokens))
    predictor.send_signal(signal.SIGCONT)

    async def renewed() -> bool:
        # Reports of source and target come one after the other.
        now = (await sightings(mesh)).get(seen.request_id)
        return now is not None and now.sampled_at is not None and now.sampled_at > moved.output_tokens

    await until(renewed, "a new estimate at the target")


async def _rounds_see_estimates(mesh: Mesh) -> None:
    record = mesh.directory / "rounds"
    flags = ("--policy", "star_plus", "--round-interval-s", "0.1", "--record", str(record))
    rescheduler = await mesh.start("rescheduler", "rescheduler", *flags)

    def seen() -> bool:
        rounds = [recorded.view for recorded in read_rounds(record)] if record.exists() else []
        loads = [load for view in rounds for at in view.instances if at.load for load in at.load.sequences]
        return any(load.remaining_tokens is not None and load.prediction_age_tokens is not None for load in loads)

    await until(seen, "a round with estimates")
    rescheduler.terminate()
    assert await rescheduler.process.wait() == 0
    assert replay(record).difference == ""


async def _dispatch_had_estimates(receiver: Receiver, requests: int) -> None:
    """The router has asked for each request, and got what the predictor says of a prompt's last token."""

    def estimates() -> list[object]:
        spans = [span for trace in list(receiver.traces.values()) for span in trace]
        found = [span.attributes for span in spans if span.name == names.SPAN_ESTIMATE]
        return [attributes[names.REMAINING_TOKENS] for attributes in found if names.REMAINING_TOKENS in attributes]

    await until(lambda: len(estimates()) >= requests, "dispatch by estimates", describe=lambda: str(estimates()))


async def _all_older(mesh: Mesh, tokens: int) -> bool:
    found = (await sightings(mesh)).values()
    return bool(found) and all(seen.age is not None and seen.age > tokens for seen in found)


async def test_a_predictor_that_dies_or_hangs_costs_its_estimates_only(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Sixteen streams, cancelled when all has been seen: their tokens are those of an undisturbed run, and estimates
    come again."""
    messages = long_requests("outlives", len(PROMPTS))
    for number, message in enumerate(messages):
        if number % 2:
            message.sampling.temperature, message.sampling.seed = 1.0, number
    async with Mesh(tmp_path, tiny_model_dir, forked=True) as mesh:
        await mesh.start_all(decode=2, flags=FLAGS)
        await mesh.start_predictor()

        async def die() -> None:
            mesh.services["predictor-0"].kill()
            await mesh.services["predictor-0"].process.wait()

        async def come_back() -> None:
            await mesh.start("predictor", "predictor-0")

        async def hang() -> None:
            mesh.services["predictor-0"].process.send_signal(signal.SIGSTOP)

        async def wake() -> None:
            mesh.services["predictor-0"].process.send_signal(signal.SIGCONT)

        disturbed: list[list[Answer]] = []
        for take_away, bring_back in ((die, come_back), (hang, wake)):
            async with running_streams(mesh, messages) as running:
                await until(lambda: _all_younger(mesh, OLD, STREAMS_SEEN), "estimates", 120)
                await take_away()
                await until(lambda: _all_older(mesh, OLD), "estimates to age", 120)
                await bring_back()
                await until(lambda: _all_younger(mesh, OLD, STREAMS_SEEN), "estimates to come again", 120)
                assert not running.done(), "the streams have ended too early to show anything"
                await cancel(mesh.inference(), messages)
                disturbed.append(await running)
            await mesh.settled()
        longest = max(len(answer.token_ids) for answers in disturbed for answer in answers)
        for message in messages:
            message.sampling.max_output_tokens = longest
        undisturbed = await generate_all(mesh.inference(), messages)
        for answers in disturbed:
            for answer, whole in zip(answers, undisturbed, strict=True):
                assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        print(f"up to {longest} tokens")


async def _all_younger(mesh: Mesh, tokens: int, least: int) -> bool:
    found = (await sightings(mesh)).values()
    return len(found) >= least and all(seen.age is not None and seen.age <= tokens for seen in found)
