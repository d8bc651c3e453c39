"""What the service learns from ends: lengths, quantiles, how well it did. In the same order, with the same result."""

from __future__ import annotations

import numpy as np
import pytest

from starmesh.v1 import predictor_pb2, sequence_pb2
from tests.predictor.conftest import Running, failure, serving, until
from tests.predictor.predictors import WAIT_S, Echo, Failing, end, request, sample


async def tell(running: Running, *ends: predictor_pb2.SequenceEnd) -> None:
    await running.predict(request(ends=ends))


async def ask(
    running: Running, name: str, output_tokens: int = 0, value: float = 0.0
) -> sequence_pb2.RemainingEstimate:
    (entry,) = (await running.predict(request([sample(name, output_tokens, value)]))).estimates
    return entry.estimate


async def test_lengths_are_learned() -> None:
    async with serving() as running:
        before = await ask(running, "a")
        assert (before.remaining_tokens, before.remaining_tokens_upper) == (200, 790)
        await tell(running, *(end(f"r{number}", 50) for number in range(100)))
        after = await ask(running, "b")
        assert (after.remaining_tokens, after.remaining_tokens_upper) == (50, 50)
        assert (await ask(running, "c", 40)).remaining_tokens == 10
        assert (await running.status()).parameters == 100


async def test_cut_requests_are_not_taken_for_their_length() -> None:
    async with serving() as running:
        ends = [end(f"r{number}", 100) for number in range(50)]
        ends += [end(f"c{number}", 60, sequence_pb2.FINISH_REASON_LENGTH) for number in range(25)]
        ends += [end(f"d{number}", 60, sequence_pb2.FINISH_REASON_CANCELLED) for number in range(25)]
        await tell(running, *ends)
        assert (await ask(running, "a")).remaining_tokens == 100


async def test_an_end_that_is_told_again_counts_once() -> None:
    async with serving() as running:
        for _ in range(3):
            await tell(running, end("a", 50), end("a", 50))
        await until(lambda: running.registry.median.parameters == 1)


@pytest.mark.parametrize("recalibrate", [True, False])
async def test_quantiles_are_corrected_by_what_came_of_them(recalibrate: bool) -> None:
    async with serving(Echo(), recalibrate=recalibrate) as running:
        generator = np.random.default_rng(1)
        for number in range(120):
            total = int(generator.integers(100, 200))
            await ask(running, f"r{number}", 0, 40)
            await tell(running, end(f"r{number}", total))
        found = await ask(running, "a", 0, 40)
        if recalibrate:
            assert found.remaining_tokens == pytest.approx(150, abs=12)
            assert found.remaining_tokens_upper == pytest.approx(190, abs=10)
        else:
            assert (found.remaining_tokens, found.remaining_tokens_upper) == (40, 80)


async def test_estimates_are_scored_by_progress() -> None:
    async with serving(Echo()) as running:
        for position, value in ((0, 90), (40, 30), (80, 20)):
            await ask(running, "a", position, value)
        await tell(running, end("a", 100))
        await ask(running, "cut", 0, 1)
        await tell(running, end("cut", 100, sequence_pb2.FINISH_REASON_LENGTH))
        status = await running.status()
        assert status.ended_sequences == 1
        assert [(q.progress_from, q.progress_to, q.estimates, q.mae_tokens, q.coverage) for q in status.qualities] == [
            (0.0, 0.25, 1, 10.0, 1.0),
            (0.25, 0.5, 1, 30.0, 1.0),
            (0.75, 1.0, 1, 0.0, 1.0),
        ]


async def test_a_call_may_bring_a_sequences_last_sample_and_its_end() -> None:
    async with serving(Echo()) as running:
        await running.predict(request([sample("a", 20, 5)], [end("a", 25)]))
        assert (await running.status()).qualities[0].mae_tokens == 0


async def test_a_promotion_begins_the_scores_anew() -> None:
    async with serving(Echo()) as running:
        await ask(running, "a", 0, 10)
        await ask(running, "b", 0, 10)
        await tell(running, end("a", 20))
        assert (await running.status()).ended_sequences == 1
        await running.promote("conditional_median")
        assert (await running.status()).ended_sequences == 0
        # Its estimate was the old version's.
        await tell(running, end("b", 20))
        assert (await running.status()).ended_sequences == 0


async def test_lengths_are_learned_while_nothing_can_be_predicted() -> None:
    async with serving(Failing()) as running:
        for number in range(30):
            await failure(running.stub.Predict(request([sample("a")], [end(f"r{number}", 70)]), timeout=WAIT_S))
        await running.promote("conditional_median")
        assert (await ask(running, "b")).remaining_tokens == 70


async def test_the_same_traffic_gives_the_same_answers() -> None:
    async def play() -> list[tuple[int, int]]:
        generator = np.random.default_rng(7)
        answers = []
        async with serving(Echo(), recalibrate=True) as running:
            for number in range(150):
                total = int(generator.integers(20, 300))
                positions = range(0, total, 20)
                samples = [sample(f"r{number}", at, float(generator.integers(1, 200))) for at in positions]
                response = await running.predict(request(samples, [end(f"r{number}", total)]))
                answers += [
                    (entry.estimate.remaining_tokens, entry.estimate.remaining_tokens_upper)
                    for entry in response.estimates
                ]
        return answers

    assert await play() == await play()
