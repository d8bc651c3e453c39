"""Sampling: known answers of the generator, the semantics of each parameter, and independence of batch mates."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from starmesh.engine.sampler import BrokenLogits, SamplingRow, philox4x32, sample, uniform
from starmesh.types import SamplingParams

PLAIN = SamplingParams(max_output_tokens=1)
VOCABULARY = 40


def row(sampling: SamplingParams = PLAIN, history: tuple[int, ...] = (1, 2, 3)) -> SamplingRow:
    return SamplingRow("r", sampling, history)


def random_logits(rows: int, seed: int, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # philox4x32-10 in kat_vectors of the authors' Random123 library
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == answer


@given(seed=st.integers(-(2**63), 2**64 - 1), position=st.integers(0, 2**40))
def test_uniforms_lie_in_the_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0


def test_uniforms_are_spread_over_positions_and_seeds() -> None:
    for draws in ([uniform(9, i) for i in range(4000)], [uniform(i, 9) for i in range(4000)]):
        counts = Counter(int(20 * draw) for draw in draws)
        assert sum((counts[i] - 200) ** 2 / 200 for i in range(20)) < 43.8  # chi-square, 19 degrees, p = 0.001


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.7), (9, 0.8), (1, 1.0), (0, 1e-6)])
def test_frequencies_follow_the_distribution_that_transformers_would_draw_from(
    top_k: int, top_p: float, penalty: float
) -> None:
    logits, history, draws = random_logits(1, seed=4), (4, 9, 9, 30), 4000
    sampling = SamplingParams(
        max_output_tokens=1, temperature=1.4, top_k=top_k, top_p=top_p, repetition_penalty=penalty
    )
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(sampling.temperature)]
        + ([TopKLogitsWarper(top_k)] if top_k else [])
        + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
    )
    wanted = processors(torch.tensor([history]), logits.clone()).softmax(-1)[0].tolist()
    rows = [SamplingRow("r", replace(sampling, seed=seed), history) for seed in range(draws)]
    counts = Counter(sample(logits.expand(draws, -1), rows))
    assert all(wanted[token_id] > 0 for token_id in counts)
    frequent = [token_id for token_id, share in enumerate(wanted) if share * draws >= 5]
    chi_square = sum((counts[i] - draws * wanted[i]) ** 2 / (draws * wanted[i]) for i in frequent)
    degrees = max(len(frequent) - 1, 1)
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_a_row_gets_the_same_token_in_any_company(data: st.DataObject, seed: int) -> None:
    params = st.builds(
        SamplingParams,
        max_output_tokens=st.just(1),
        temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
        top_k=st.sampled_from([0, 1, 5, VOCABULARY, 1000]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        seed=st.integers(0, 2**64 - 1),
    )
    histories = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8).map(tuple)
    rows = data.draw(st.lists(st.builds(SamplingRow, st.just("r"), params, histories), min_size=1, max_size=6))
    logits = random_logits(len(rows), seed)
    together = sample(logits, rows)
    order = data.draw(st.permutations(range(len(rows))))
    assert [together[i] for i in order] == sample(logits[list(order)], [rows[i] for i in order])
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]


def test_greedy_is_argmax_and_leaves_the_logits_alone() -> None:
    logits = random_logits(3, seed=1)
    before = logits.clone()
    greedy = replace(PLAIN, temperature=0.0)
    assert sample(logits, [row(greedy)] * 3) == logits.argmax(-1).tolist()
    assert sample(logits, [row(replace(PLAIN, temperature=1e-30))] * 3) == logits.argmax(-1).tolist()
    sample(logits, [row(replace(greedy, repetition_penalty=2.0))] * 3)
    assert torch.equal(logits, before)


def test_repetition_penalty_counts_every_token_before() -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0]])
    greedy = replace(PLAIN, temperature=0.0, repetition_penalty=2.0)
    assert sample(logits, [row(greedy, history=(0,))]) == [1]
    assert sample(logits, [row(greedy, history=(0, 1, 0))]) == [0]


def test_a_nucleus_wider_than_the_first_guess() -> None:
    flat = torch.zeros(1, 5000)
    flat[0, 4999] = 1e-3
    rows = [row(replace(PLAIN, top_p=0.9, seed=seed)) for seed in range(50)]
    assert len(set(sample(flat.expand(50, -1), rows))) > 40


def test_small_rounding_hardly_ever_changes_a_draw() -> None:
    logits = torch.zeros(1, VOCABULARY)  # all tied: an order by probability would be shuffled by rounding
    nudged = logits + 1e-6 * random_logits(1, seed=2)
    rows = [row(replace(PLAIN, seed=seed)) for seed in range(2000)]
    first, second = (sample(scores.expand(2000, -1), rows) for scores in (logits, nudged))
    assert sum(a != b for a, b in zip(first, second, strict=True)) <= 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_are_an_error_that_names_the_request(value: float, temperature: float) -> None:
    logits = random_logits(2, seed=0)
    logits[1, 7] = value
    rows = [SamplingRow(name, replace(PLAIN, temperature=temperature), (1,)) for name in ("good", "bad")]
    with pytest.raises(BrokenLogits, match="request bad"):
        sample(logits, rows)
