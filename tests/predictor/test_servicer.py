"""Calls over a real connection: answers, limits, refusals, batches, floods, slow and broken predictors."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

import grpc
import grpc.aio
import numpy as np
import pytest

from services.predictor.intake import MAX_SAMPLES, samples_of
from starmesh.prediction.averaging import averaged
from starmesh.prediction.batch import Floats, SampleBatch
from starmesh.types import HiddenLayout
from starmesh.v1 import predictor_pb2, sequence_pb2
from tests.predictor.conftest import failure, serving, until
from tests.predictor.predictors import LAYOUT, WAIT_S, Echo, Failing, end, request, sample


def values(response: predictor_pb2.PredictResponse) -> dict[str, int]:
    return {entry.request_id: entry.estimate.remaining_tokens for entry in response.estimates}


async def test_every_sample_gets_its_estimate() -> None:
    async with serving(Echo()) as running:
        response = await running.predict(request([sample("a", 20, 7), sample("b", 0, 3), sample("a", 40, 5)]))
        found = [(e.request_id, e.estimate) for e in response.estimates]
        estimate = sequence_pb2.RemainingEstimate
        assert found == [
            ("a", estimate(output_tokens=20, remaining_tokens=7, remaining_tokens_upper=14)),
            ("b", estimate(output_tokens=0, remaining_tokens=3, remaining_tokens_upper=6)),
            ("a", estimate(output_tokens=40, remaining_tokens=5, remaining_tokens_upper=10)),
        ]
        assert response.version == "given"
        status = await running.status()
        assert (status.version, status.kind, status.parameters, status.predictions) == ("given", "echo", 1, 3)
        assert list(status.layout.layers) == [2, 4] and status.latency.ToTimedelta().total_seconds() > 0


async def test_a_call_may_bring_nothing() -> None:
    async with serving(Echo()) as running:
        response = await running.predict(request())
        assert not response.estimates and response.version == "given"


async def test_any_model_is_answered_without_a_trained_predictor() -> None:
    async with serving() as running:
        one, other = HiddenLayout("rev-1", (2, 4), 3), HiddenLayout("rev-2", (9,), 1024)
        for layout in (one, other):
            response = await running.predict(request([sample("a", 0, 0, layout)], layout=layout))
            assert response.version == "conditional_median" and values(response) == {"a": 200}
        # Both kinds in one batch: its states would not fit together.
        calls = [running.predict(request([sample("a", 0, 0, layout)], layout=layout)) for layout in (one, other) * 8]
        assert all(values(response) == {"a": 200} for response in await asyncio.gather(*calls))
        assert not (await running.status()).HasField("layout")


def _wrong(**changes: object) -> predictor_pb2.PredictionSample:
    wrong = sample("a")
    for name, value in changes.items():
        setattr(wrong, name, value)
    return wrong


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (request([sample("a"), _wrong(hidden_state=b"12345")]), "samples[1].hidden_state"),
        (request([_wrong(hidden_state=b"")]), "samples[0].hidden_state"),
        (request([sample("a"), sample("b", 0, np.nan)]), "samples[1].hidden_state"),
        (request([sample("a", 0, np.inf)]), "samples[0].hidden_state"),
        (request([_wrong(request_id="")]), "samples[0].request_id"),
        (request([_wrong(request_id="a b")]), "samples[0].request_id"),
        (request([_wrong(request_id="a" * 129)]), "samples[0].request_id"),
        (request([_wrong(output_tokens=-1)]), "samples[0].output_tokens"),
        (request([_wrong(prompt_tokens=-1)]), "samples[0].prompt_tokens"),
        (request([sample("a", 20), sample("a", 20)]), "samples[1]"),
        (request([sample("a", number) for number in range(MAX_SAMPLES + 1)]), "samples"),
        (request(ends=[end("a", 1)] * 1025), "ends"),
        (request(ends=[end("", 1)]), "ends[0].request_id"),
        (request(ends=[end("a", -1)]), "ends[0].output_tokens"),
        (request(ends=[end("a", 1, sequence_pb2.FINISH_REASON_UNSPECIFIED)]), "ends[0].finish_reason"),
        (request([sample("a")], layout=HiddenLayout("", (2, 4), 3)), "layout.model_revision"),
        (request([sample("a")], layout=HiddenLayout("r" * 257, (2, 4), 3)), "layout.model_revision"),
        (request([sample("a")], layout=HiddenLayout("rev-1", (), 3)), "layout.layers"),
        (request([sample("a")], layout=HiddenLayout("rev-1", (4, 2), 3)), "layout.layers"),
        (request([sample("a")], layout=HiddenLayout("rev-1", (2, 2), 3)), "layout.layers"),
        (request([sample("a")], layout=HiddenLayout("rev-1", tuple(range(17)), 3)), "layout.layers"),
        (request([sample("a")], layout=HiddenLayout("rev-1", (2, 4), 0)), "layout.width"),
        (request([sample("a")], layout=HiddenLayout("rev-1", (2, 4), 1 << 17)), "layout.width"),
    ],
)
async def test_what_is_out_of_its_limits_is_named(message: predictor_pb2.PredictRequest, field: str) -> None:
    async with serving(Echo()) as running:
        refused = await failure(running.stub.Predict(message, timeout=WAIT_S))
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


def test_the_largest_call_is_taken() -> None:
    samples = samples_of(request([sample("a", number, 1) for number in range(MAX_SAMPLES)]))
    assert samples is not None and samples.hidden_states.shape == (MAX_SAMPLES, 2, 3)


async def test_of_more_layers_a_predictor_takes_its_own() -> None:
    more = HiddenLayout("rev-1", (1, 2, 3, 4), 3)
    states = np.full((4, 3), 9, dtype="<f2")
    states[1] = 7
    asked = sample("a")
    asked.hidden_state = states.tobytes()
    async with serving(Echo()) as running:
        answer = await running.stub.Predict(request([asked], layout=more), timeout=WAIT_S)
    assert [answered.estimate.remaining_tokens for answered in answer.estimates] == [7]


@pytest.mark.parametrize(
    ("layout", "field", "named"),
    [
        (HiddenLayout("rev-2", (2, 4), 3), "layout.model_revision", ["rev-2", "rev-1"]),
        (HiddenLayout("rev-1", (4,), 3), "layout.layers", ["[4]", "[2, 4]"]),
        (HiddenLayout("rev-1", (2, 4), 5), "layout.width", ["5", "3"]),
    ],
)
async def test_samples_of_another_kind_are_refused(layout: HiddenLayout, field: str, named: list[str]) -> None:
    async with serving(Echo()) as running:
        wrong = request([sample("a", 0, 0, layout)], [end("b", 30)], layout)
        refused = await failure(running.stub.Predict(wrong, timeout=WAIT_S))
        assert (refused.code, refused.fields) == (grpc.StatusCode.FAILED_PRECONDITION, [field])
        assert all(word in refused.message for word in [*named, "given", "promote"])
        # Its ends count all the same, and others are served.
        await until(lambda: running.registry.median.parameters == 1)
        assert values(await running.predict(request([sample("a", 0, 4)]))) == {"a": 4}


async def test_what_waits_goes_in_one_forward() -> None:
    echo = Echo(gate=threading.Semaphore(0))
    async with serving(echo) as running:
        first = asyncio.create_task(running.predict(request([sample("first")])))
        await until(lambda: echo.batches == [1])
        calls = [
            asyncio.create_task(running.predict(request([sample(f"d{i}-{j}", 20, 10 * i + j) for j in range(5)])))
            for i in range(4)
        ]
        await running.queued(20)
        assert echo.gate is not None
        echo.gate.release(2)
        await first
        for index, call in enumerate(calls):
            assert values(await call) == {f"d{index}-{j}": 10 * index + j for j in range(5)}
        assert echo.batches == [1, 20]


async def test_a_batch_is_bounded() -> None:
    echo = Echo()
    async with serving(echo) as running:
        response = await running.predict(request([sample("a", number, number) for number in range(600)]))
        assert [entry.estimate.output_tokens for entry in response.estimates] == list(range(600))
        assert echo.batches == [256, 256, 88]


async def test_a_flood_drops_the_oldest() -> None:
    echo = Echo(gate=threading.Semaphore(0))
    async with serving(echo, queue=8) as running:
        first = asyncio.create_task(running.predict(request([sample("first", 0, 1)])))
        await until(lambda: echo.batches == [1])
        gone = asyncio.create_task(running.predict(request([sample(f"g{j}", 20, j) for j in range(3)])))
        await running.queued(3)
        old = asyncio.create_task(running.predict(request([sample(f"o{j}", 20, j) for j in range(5)])))
        await running.queued(8)
        new = asyncio.create_task(running.predict(request([sample(f"n{j}", 20, j) for j in range(6)])))
        # All of its samples were dropped, so it is over while the forward goes on.
        assert values(await gone) == {}
        await until(lambda: running.metrics.dropped_samples == 6)
        flood = asyncio.create_task(running.predict(request([sample(f"f{j}", 20, j) for j in range(100)])))
        assert values(await old) == {} and values(await new) == {}
        await running.queued(8)
        assert echo.gate is not None
        echo.gate.release(2)
        assert values(await first) == {"first": 1}
        assert values(await flood) == {f"f{j}": j for j in range(92, 100)}
        status = await running.status()
        assert (status.predictions, status.dropped_samples) == (9, 3 + 5 + 6 + 92)


async def test_a_call_past_its_deadline_leaves_nothing() -> None:
    echo = Echo(gate=threading.Semaphore(0))
    async with serving(echo) as running:
        first = asyncio.create_task(running.predict(request([sample("first", 0, 1)])))
        await until(lambda: echo.batches == [1])
        late = running.stub.Predict(request([sample("a"), sample("b")], [end("c", 50)]), timeout=1.5)
        refused = await failure(late)
        assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await running.queued(0)
        await until(lambda: running.metrics.dropped_samples == 2)
        assert echo.gate is not None
        echo.gate.release(2)
        assert values(await first) == {"first": 1}
        # What it said of ends holds.
        await until(lambda: running.registry.median.parameters == 1)
        assert values(await running.predict(request([sample("d", 0, 2)]))) == {"d": 2}
        assert echo.batches == [1, 1]


async def test_a_caller_that_leaves_takes_its_samples_along() -> None:
    echo = Echo(gate=threading.Semaphore(0))
    async with serving(echo) as running:
        first = running.stub.Predict(request([sample("first", 0, 1)]), timeout=WAIT_S)
        await until(lambda: echo.batches == [1])
        second = running.stub.Predict(request([sample("a"), sample("b")]), timeout=WAIT_S)
        await running.queued(2)
        second.cancel()
        await running.queued(0)
        first.cancel()
        await until(lambda: running.metrics.dropped_samples == 3)
        assert echo.gate is not None
        echo.gate.release(2)
        assert values(await running.predict(request([sample("c", 0, 9)]))) == {"c": 9}


async def test_a_slow_predictor_answers_what_it_can_in_time() -> None:
    echo = Echo(gate=threading.Semaphore(1))
    async with serving(echo) as running:
        samples = samples_of(request([sample("a", number, number) for number in range(300)]))
        prediction = await running.service.predict(samples, [], timeout_s=2.0)
        assert sorted(prediction.estimates) == list(range(256))
        assert running.metrics.dropped_samples == 44
        assert echo.gate is not None
        echo.gate.release(2)


async def test_what_was_answered_in_time_reaches_the_caller() -> None:
    echo = Echo(gate=threading.Semaphore(1))
    async with serving(echo) as running:
        message = request([sample("a", number, number) for number in range(300)])
        assert len((await running.stub.Predict(message, timeout=3.0)).estimates) == 256
        assert echo.gate is not None
        echo.gate.release(2)


async def test_a_broken_predictor_is_said_once_and_can_be_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Failing()) as running:
        for _ in range(3):
            refused = await failure(running.stub.Predict(request([sample("a")], [end("b", 9)]), timeout=WAIT_S))
            assert refused.code is grpc.StatusCode.INTERNAL
            assert "given failed (the weights are upside down)" in refused.message
        assert caplog.text.count("predictor given fails") == 1
        await running.promote("conditional_median")
        assert values(await running.predict(request([sample("a")])))
        assert (await running.status()).dropped_samples == 3


class _Nan(Echo):
    def predict(self, batch: SampleBatch) -> Floats:
        found = super().predict(batch)
        found[found > 1e4] = float("nan")
        return found


class _Infinite(Echo):
    def predict(self, batch: SampleBatch) -> Floats:
        found = super().predict(batch)
        found[found > 1e4] = float("inf")
        return found


@pytest.mark.parametrize("predictor", [_Nan(), _Infinite()])
async def test_what_is_not_a_number_is_left_out(predictor: Echo) -> None:
    async with serving(predictor) as running:
        response = await running.predict(request([sample("a", 0, 1), sample("b", 0, 6e4), sample("c", 0, 3)]))
        assert values(response) == {"a": 1, "c": 3}
        status = await running.status()
        assert (status.predictions, status.dropped_samples) == (2, 1)


async def test_calls_beyond_the_bound_are_sent_away() -> None:
    echo = Echo(gate=threading.Semaphore(0))
    async with serving(echo, max_calls=1) as running:
        first = asyncio.create_task(running.predict(request([sample("a", 0, 1)])))
        await until(lambda: echo.batches == [1])
        refused = await failure(running.stub.Predict(request([sample("b")]), timeout=WAIT_S))
        assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED and refused.retry_delay_s
        assert echo.gate is not None
        echo.gate.release()
        assert values(await first) == {"a": 1}


@dataclass
class _Averaged(Echo):
    """Says the average of the first number over a sequence's samples, times a thousand."""

    def predict(self, batch: SampleBatch) -> Floats:
        assert batch.averaged_states is not None
        median = 1000 * batch.averaged_states[:, 0, 0]
        return np.stack([median, median], axis=1)


async def test_states_are_averaged_over_a_sequences_samples() -> None:
    """Whichever instances send them, with or without those of other sequences."""
    async with serving(_Averaged()) as running:
        found: dict[str, list[int]] = {"a": [], "b": []}
        for position in range(0, 200, 20):
            samples = [sample("a", position, position), sample("b", position, -position)]
            for part in [samples] if position % 40 else [samples[:1], samples[1:]]:
                for name, count in values(await running.predict(request(part))).items():
                    found[name].append(count)
        positions = np.arange(0, 200, 20, dtype=np.int32)
        states = np.repeat(positions.astype(np.float16), 6).reshape(-1, 2, 3)
        assert found["a"] == np.round(1000 * averaged(states, positions)[:, 0, 0]).tolist()
        assert found["b"] == [0] * 10
        # Its end forgets it.
        await running.predict(request(ends=[end("a", 200)]))
        await running.predict(request([sample("c")]))
        assert values(await running.predict(request([sample("a", 20, 7)]))) == {"a": 7000}


async def test_a_predictor_of_no_layer_takes_all_samples_of_its_model() -> None:
    class Counts(Echo):
        def predict(self, batch: SampleBatch) -> Floats:
            assert batch.hidden_states.shape == (len(batch), 0, 0)
            return np.repeat(batch.output_tokens[:, None].astype(np.float32), 2, axis=1)

    async with serving(Counts(HiddenLayout("rev-1", (), 0))) as running:
        for layout in (LAYOUT, HiddenLayout("rev-1", (9,), 64)):
            assert values(await running.predict(request([sample("a", 60, 0, layout)], layout=layout))) == {"a": 60}
        other = HiddenLayout("rev-2", (9,), 64)
        refused = await failure(running.stub.Predict(request([sample("a", 0, 0, other)], layout=other), timeout=WAIT_S))
        assert refused.fields == ["layout.model_revision"]


async def test_large_estimates_fit_the_wire() -> None:
    async with serving(Echo(add=1e12)) as running:
        (entry,) = (await running.predict(request([sample("a")]))).estimates
        assert entry.estimate.remaining_tokens == entry.estimate.remaining_tokens_upper == 1 << 30
        assert running.registry.active.predictor.layout == LAYOUT
