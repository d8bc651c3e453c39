"""Estimates of decode instances from a predictor on a socket: in their loads, older with each token, along in
migrations; and whatever the predictor does, the tokens are the same."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from services.decode.config import PredictorConfig
from services.decode.worker import DecodeWorker
from starmesh.rpc import convert
from starmesh.types import FinishReason, HiddenLayout, RemainingEstimate, SequenceLoad
from starmesh.v1 import sequence_pb2
from tests.decode import predictor_peer as peers
from tests.decode.cluster import Cluster, Hold, Request, running_cluster
from tests.decode.predictor_peer import MARGIN_TOKENS, TOTAL_TOKENS, Answer, PredictorPeer, estimated, predictor_peer
from tests.engine.checking_executor import EOS, HIDDEN_LAYOUT, hidden_state, reference_tokens
from tests.instance.running import spec, until

CONFIG = PredictorConfig(timeout_s=5.0, first_pause_s=0.02, longest_pause_s=0.1, refused_pause_s=0.02)
IMPATIENT = replace(CONFIG, timeout_s=0.3)
STEP_S = 0.002
LIMIT = 900


@asynccontextmanager
async def predicting(
    ids: str = "A",
    *,
    answer: Answer = peers.answers,
    predictor: PredictorConfig = CONFIG,
    eos_token_ids: frozenset[int] = frozenset(),
    **settings: Any,
) -> AsyncIterator[tuple[Cluster, PredictorPeer]]:
    """A cluster with a predictor, whose sequences do not end by themselves unless there are ``eos_token_ids``."""
    async with running_cluster(ids, predictor=predictor, eos_token_ids=eos_token_ids, **settings) as cluster:
        for executor in cluster.executors.values():
            executor.step_s = STEP_S
        async with predictor_peer(cluster.ledger, answer) as peer:
            yield cluster, peer


async def begin(cluster: Cluster, name: str = "a", on: str = "A", *, limit: int = LIMIT, **given: Any) -> Request:
    return await cluster.router.start(spec(name, limit=limit, ignore_eos=False), on, **given)


async def finish(cluster: Cluster, *requests: Request) -> None:
    for request in requests:
        assert await request.ended() is FinishReason.LENGTH
        assert request.stream.token_ids == request.reference
    await cluster.nothing_left()


async def load_of(cluster: Cluster, name: str = "a", on: str = "A") -> SequenceLoad | None:
    load = await cluster.decode[on].instance.load()
    return next((one for one in load.sequences if one.request_id == name), None)


async def until_load(
    cluster: Cluster, condition: Callable[[SequenceLoad], object], name: str = "a", on: str = "A"
) -> SequenceLoad:
    """Wait for a sequence's load to be so."""
    found: list[SequenceLoad] = []

    async def so() -> bool:
        load = await load_of(cluster, name, on)
        if load is not None and condition(load):
            found.append(load)
        return bool(found)

    await until(so)
    return found[0]


async def fall_silent(peer: PredictorPeer) -> None:
    """Have the predictor answer nothing more, and wait until no answer is on its way: one call is, at a time."""
    peer.answer, calls = peers.hangs, len(peer.calls)
    await peer.until(lambda: len(peer.calls) > calls)


def is_predicted(load: SequenceLoad) -> bool:
    return load.remaining_tokens is not None


def position(load: SequenceLoad) -> int:
    """Where the estimate was made."""
    assert load.prediction_age_tokens is not None
    return load.output_tokens - load.prediction_age_tokens


async def test_samples_come_every_twenty_tokens_and_estimates_are_in_the_load() -> None:
    async with predicting() as (cluster, peer):
        request = await begin(cluster)
        await until_load(cluster, lambda load: is_predicted(load) and position(load) >= 60)
        for load in [await load_of(cluster) for _ in range(5)]:
            assert load is not None and load.remaining_tokens is not None
            assert load.remaining_tokens + load.output_tokens == TOTAL_TOKENS
            assert load.remaining_tokens_upper == load.remaining_tokens + MARGIN_TOKENS
            assert position(load) % 20 == 0
        await finish(cluster, request)
        assert peer.most_in_flight == 1
        for call in peer.calls:
            assert call.instance_id == "A"
            assert convert.hidden_layout(call.layout) == HIDDEN_LAYOUT
        positions = [sample.output_tokens for sample in peer.samples]
        assert positions == sorted(set(positions))
        assert all(position % 20 == 0 for position in positions)
        tokens = [*request.spec.prompt_token_ids, *request.reference]
        for sample in peer.samples:
            assert (sample.request_id, sample.prompt_tokens) == ("a", 10)
            state = hidden_state(tokens[: 10 + sample.output_tokens])
            assert np.array_equal(np.frombuffer(sample.hidden_state, "<f2").reshape(2, 3), state)
            if sample.HasField("previous"):
                assert sample.previous.output_tokens < sample.output_tokens
                assert convert.estimate(sample.previous) == estimated(sample.previous.output_tokens)
        assert any(sample.HasField("previous") for sample in peer.samples)


async def test_the_prefills_hidden_state_is_sent_as_the_instances_own() -> None:
    async with predicting(hidden_every_tokens=10_000) as (cluster, peer):
        request = await begin(cluster)
        load = await until_load(cluster, is_predicted)
        assert position(load) == 0
        await finish(cluster, request)
        (sample,) = peer.samples
        state = hidden_state(request.spec.prompt_token_ids)
        assert np.array_equal(np.frombuffer(sample.hidden_state, "<f2").reshape(2, 3), state)


@pytest.mark.parametrize(
    "answer",
    [peers.answers, peers.hangs, peers.refuses, peers.overloaded, peers.says_nothing, peers.lies, peers.floods],
)
async def test_tokens_do_not_depend_on_the_predictor(answer: Answer) -> None:
    async with predicting(answer=answer, predictor=IMPATIENT) as (cluster, peer):
        requests = [await begin(cluster, name, limit=300) for name in "abc"]
        # Not before it has shown twice what it does.
        await peer.until(lambda: len(peer.calls) >= 2)
        load = await load_of(cluster, "c")
        assert load is None or answer is peers.answers or not is_predicted(load)
        await finish(cluster, *requests)
        # The end of a call that was given up may come to the predictor after the next one.
        assert peer.most_in_flight <= (2 if answer is peers.hangs else 1)


async def test_without_a_predictor_what_waits_is_bounded() -> None:
    config = PredictorConfig(queue_samples=2, first_pause_s=0.01, longest_pause_s=0.02)
    async with running_cluster("A", predictor=config, eos_token_ids=frozenset()) as cluster:
        requests = [await begin(cluster, name, limit=100) for name in "abcde"]
        await finish(cluster, *requests)
        queue = cluster.worker("A").remaining.queue
        assert queue.dropped_samples >= 3 and queue.dropped_ends == 3
        assert len(queue) == 4


async def test_an_estimate_ages_while_the_predictor_is_silent() -> None:
    async with predicting(predictor=IMPATIENT) as (cluster, peer):
        request = await begin(cluster)
        first = await until_load(cluster, is_predicted)
        await fall_silent(peer)
        seen = [
            await until_load(cluster, lambda load, age=age: load.prediction_age_tokens > age) for age in (25, 45, 65)
        ]
        assert position(seen[0]) >= position(first)
        assert len({position(load) for load in seen}) == 1
        ages = [load.prediction_age_tokens for load in seen]
        assert ages == sorted(set(ages))
        assert all(load.remaining_tokens == TOTAL_TOKENS - load.output_tokens for load in seen)
        await finish(cluster, request)


async def test_an_estimate_does_not_fall_below_nothing() -> None:
    async with predicting(answer=peers.hangs) as (cluster, peer):
        request = await begin(cluster, estimate=RemainingEstimate(1, 3, 8))
        load = await until_load(cluster, lambda load: load.prediction_age_tokens > 10 and position(load) == 1)
        assert (load.remaining_tokens, load.remaining_tokens_upper) == (0, 0)
        peer.let_go.set()
        await finish(cluster, request)


@pytest.mark.parametrize("elsewhere", [True, False], ids=["new address", "same address"])
async def test_estimates_come_again_when_the_predictor_does(elsewhere: bool) -> None:
    async with predicting() as (cluster, peer):
        requests = [await begin(cluster, name) for name in "ab"]
        await until_load(cluster, is_predicted)
        old = peer.address
        await peer.die()
        left = await until_load(cluster, lambda load: load.prediction_age_tokens > 45)
        await peer.start() if elsewhere else await peer.start(old)
        for name in "ab":
            again = await until_load(
                cluster, lambda load: is_predicted(load) and position(load) > left.output_tokens - 20, name
            )
            assert again.remaining_tokens == TOTAL_TOKENS - again.output_tokens
        await finish(cluster, *requests)


async def test_a_refusal_is_logged_once_and_asked_about_again(caplog: pytest.LogCaptureFixture) -> None:
    async with predicting(answer=peers.refuses) as (cluster, peer):
        with caplog.at_level(logging.INFO, "services.decode.predictor_link"):
            request = await begin(cluster)
            await peer.until(lambda: len(peer.calls) >= 4)
            (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
            assert "refuses the hidden states of this instance" in warning
            assert "layers 3 of another model" in warning
            peer.answer = peers.answers
            await until_load(cluster, is_predicted)
            assert "answers again" in caplog.records[-1].getMessage()
        await finish(cluster, request)


async def test_an_estimate_goes_along_with_its_sequence() -> None:
    async with predicting("AB", predictor=IMPATIENT) as (cluster, peer):
        request = await begin(cluster)
        await until_load(cluster, is_predicted)
        await fall_silent(peer)
        before = await until_load(cluster, lambda load: load.prediction_age_tokens > 25)
        assert (await cluster.migrate("a", "A", "B").outcome()).moved
        after = await until_load(cluster, lambda load: True, on="B")
        assert position(after) == position(before)
        assert after.remaining_tokens == TOTAL_TOKENS - after.output_tokens
        assert after.remaining_tokens_upper == after.remaining_tokens + MARGIN_TOKENS
        peer.answer = peers.answers
        await until_load(cluster, lambda load: position(load) > after.output_tokens, on="B")
        assert any(call.instance_id == "B" and call.samples for call in peer.calls)
        await finish(cluster, request)


async def test_the_estimate_that_moves_is_the_one_of_the_freeze() -> None:
    async with predicting("AB", answer=peers.hangs, predictor=IMPATIENT) as (cluster, _):
        request = await begin(cluster)
        reserving = Hold(cluster.worker("B").migrator.incoming, "reserve")
        migration = cluster.migrate("a", "A", "B")
        await reserving.until_reached()
        latest = RemainingEstimate(1, 77, 88)
        cluster.worker("A").running["a"].estimate = latest
        reserving.open.set()
        assert (await migration.outcome()).moved
        assert cluster.worker("B").running["a"].estimate == latest
        await finish(cluster, request)


async def test_an_answer_for_what_has_moved_away_is_for_nobody() -> None:
    async with predicting("AB", answer=peers.hangs, predictor=replace(CONFIG, timeout_s=20.0)) as (cluster, peer):
        request = await begin(cluster)
        await peer.until(lambda: peer.calls)
        assert (await cluster.migrate("a", "A", "B").outcome()).moved
        peer.let_go.set()
        await until_load(cluster, is_predicted, on="B")
        assert await load_of(cluster, on="A") is None
        await finish(cluster, request)


async def test_the_routers_estimate_counts_at_once_and_its_sample_is_not_sent_again() -> None:
    async with predicting() as (cluster, peer):
        request = await begin(cluster, estimate=RemainingEstimate(0, 400, 500))
        load = await until_load(cluster, is_predicted)
        if position(load) == 0:
            assert load.remaining_tokens == 400 - load.output_tokens
        await peer.until(lambda: peer.samples)
        # A newer one takes the place of one that waits.
        assert peer.samples[0].output_tokens >= 20
        assert convert.estimate(peer.samples[0].previous) == RemainingEstimate(0, 400, 500)
        await finish(cluster, request)


@pytest.mark.parametrize("estimate", [RemainingEstimate(3, 400, 500), RemainingEstimate(0, 9, 2)])
async def test_what_cannot_be_an_estimate_is_not_taken_in(estimate: RemainingEstimate) -> None:
    async with predicting(answer=peers.hangs) as (cluster, _):
        request = await begin(cluster, estimate=estimate)
        load = await load_of(cluster)
        assert load is not None and not is_predicted(load)
        await finish(cluster, request)


@pytest.mark.parametrize(
    ("layout", "lacking"), [(HIDDEN_LAYOUT, 2), (replace(HIDDEN_LAYOUT, layers=(1, 3)), 0)], ids=["size", "layers"]
)
async def test_a_hidden_state_of_another_layout_is_not_sent(
    layout: HiddenLayout, lacking: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with predicting() as (cluster, peer):
        for name in "ab":
            sequence = spec(name, limit=30, ignore_eos=False)
            done = await cluster.prefill.worker.prefill(sequence, "checking")
            cluster.worker("A").start(
                _Nobody(),  # type: ignore[arg-type]
                spec(name, limit=30, outputs=(done.token_id,), ignore_eos=False),
                done.ticket,
                timeout_s=60.0,
                traceparent="",
                hidden_state=done.hidden_state[: len(done.hidden_state) - lacking],
                hidden_layout=layout,
            )
        await peer.until(lambda: len(peer.ends) == 2)
        assert {sample.output_tokens for sample in peer.samples} <= {20}
        assert caplog.text.count("give prefill and decode instances the same --hidden-layers") == 1
        await cluster.nothing_left()


class _Nobody:
    """A router that reads nothing."""

    def put(self, output: sequence_pb2.SequenceOutput) -> None:
        assert not output.HasField("failure")


async def test_what_goes_on_to_its_limit_is_known_without_asking() -> None:
    async with predicting() as (cluster, peer):
        ignoring = await cluster.router.start(spec("a", limit=LIMIT), "A")
        load = await until_load(cluster, lambda load: True)
        assert load.remaining_tokens == load.remaining_tokens_upper == LIMIT - load.output_tokens
        assert load.prediction_age_tokens == 0
        other = await begin(cluster, "b", limit=100)
        await finish(cluster, ignoring, other)
        await peer.until(lambda: peer.ends)
        assert {sample.request_id for sample in peer.samples} == {"b"}
        assert {name for name, _, _ in peer.ends} == {"b"}


async def test_the_engine_preempts_by_what_its_loads_foresee() -> None:
    async with predicting() as (cluster, _):
        cluster.executors["A"].step_s = 0.005  # they all run until that is seen
        limits = {"a": LIMIT, "b": LIMIT, "c": LIMIT - 100, "d": LIMIT - 50}
        requests = [await cluster.router.start(spec(name, limit=limit), "A") for name, limit in limits.items()]
        engine = cluster.decode["A"].instance.engine

        async def so() -> bool:
            await load_of(cluster)
            # The longest first; the oldest last, though none is longer.
            return await engine.call(lambda core: core.preempted_first()) == ("b", "d", "c", "a")

        await until(so)
        await finish(cluster, *requests)


def prompt_that_stops(limit: int) -> tuple[int, int]:
    """The length of a prompt after which EOS comes before ``limit``, and how many tokens come with it."""
    for prompt in range(4, 200):
        tokens = reference_tokens(spec("a", prompt=prompt).prompt_token_ids, limit)
        if EOS in tokens[80:] and EOS not in tokens[:80]:
            return prompt, tokens.index(EOS) + 1
    raise AssertionError("no such prompt")


async def test_ends_are_told_by_the_instance_where_they_are() -> None:
    prompt, stops_at = prompt_that_stops(200)
    async with predicting("AB", eos_token_ids=frozenset([EOS])) as (cluster, peer):
        cluster.executors["A"].step_s = 0.02  # it moves long before it stops
        stops = await cluster.router.start(spec("a", prompt=prompt, limit=LIMIT, ignore_eos=False), "A")
        assert (await cluster.migrate("a", "A", "B").outcome()).moved
        assert await stops.ended() is FinishReason.STOP
        await peer.until(lambda: peer.ends)
        assert peer.ends == [("a", stops_at, sequence_pb2.FINISH_REASON_STOP)]
        assert [call.instance_id for call in peer.calls if call.ends] == ["B"]
        # All its samples have come before, or with it.
        assert {sample.request_id for sample in peer.samples} == {"a"}
        await cluster.nothing_left()


async def test_cancels_and_deadlines_are_ends_and_a_routers_death_is_none() -> None:
    async with predicting() as (cluster, peer):
        for name in "abc":
            await begin(cluster, name)
        worker = cluster.worker("A")
        await cluster.router.cancel("A", "a", 1)
        await peer.until(lambda: len(peer.ends) == 1)
        worker._expire(worker._running["b"])
        await peer.until(lambda: len(peer.ends) == 2)
        assert [(name, reason) for name, _, reason in peer.ends] == [
            ("a", sequence_pb2.FINISH_REASON_CANCELLED),
            ("b", sequence_pb2.FINISH_REASON_CANCELLED),
        ]
        await cluster.router.part("A")
        await cluster.nothing_left()
        assert len(peer.ends) == 2 and not len(worker.remaining.queue)


async def test_the_last_ends_are_told_before_an_instance_stops() -> None:
    async with predicting() as (cluster, peer):
        request = await begin(cluster, limit=30)
        await request.ended()
        await cluster.decode["A"].stop()
        assert peer.ends == [("a", 30, sequence_pb2.FINISH_REASON_LENGTH)]


async def test_a_predictor_that_hangs_keeps_no_instance_from_stopping() -> None:
    async with predicting(answer=peers.hangs, predictor=IMPATIENT) as (cluster, peer):
        await begin(cluster)
        await peer.until(lambda: peer.calls)
        await cluster.decode["A"].stop()
        worker: DecodeWorker = cluster.worker("A")
        assert worker.remaining.link is not None
        worker.remaining.link.wake()  # nothing begins any more
        assert worker.remaining.link._task is not None and worker.remaining.link._task.done()
