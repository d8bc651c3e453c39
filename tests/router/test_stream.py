"""The token stream: whatever comes, in whatever order and however often, its tokens are there once and in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.stream import TokenStream, Verdict
from starmesh.types import FinishReason

pytestmark = pytest.mark.fast


def started(max_output_tokens: int = 100, epoch: int = 1) -> TokenStream:
    stream = TokenStream(max_output_tokens=max_output_tokens)
    stream.begin(epoch)
    return stream


def test_takes_tokens_in_order_and_trims_what_it_has() -> None:
    stream = started()
    assert stream.accept(1, 0, [7, 8]) is Verdict.NEW
    assert stream.accept(1, 0, [7, 8]) is Verdict.DUPLICATE
    assert stream.accept(1, 1, [8, 9]) is Verdict.NEW
    assert stream.token_ids == [7, 8, 9]


def test_a_hole_is_reported_and_nothing_is_taken() -> None:
    stream = started()
    stream.accept(1, 0, [7])
    assert stream.accept(1, 2, [9], FinishReason.STOP) is Verdict.GAP
    assert stream.token_ids == [7]
    assert stream.finish_reason is None


def test_an_older_epoch_is_refused_even_where_it_fits() -> None:
    stream = started()
    stream.accept(1, 0, [7])
    stream.begin(2)
    assert stream.accept(1, 1, [8]) is Verdict.STALE
    assert stream.accept(2, 1, [8]) is Verdict.NEW
    with pytest.raises(ValueError, match="older"):
        stream.begin(1)


def test_a_newer_epoch_is_adopted() -> None:
    stream = started()
    stream.accept(1, 0, [7])
    assert stream.accept(3, 1, [8]) is Verdict.NEW
    assert stream.accept(2, 2, [9]) is Verdict.STALE


def test_the_end_may_come_alone_and_only_once() -> None:
    stream = started()
    stream.accept(1, 0, [7, 8])
    assert stream.accept(1, 2, [], FinishReason.STOP) is Verdict.END
    assert stream.accept(1, 2, [9]) is Verdict.STALE
    assert not stream.end(FinishReason.CANCELLED)
    assert stream.finish_reason is FinishReason.STOP


def test_an_end_before_the_last_token_is_of_the_past() -> None:
    stream = started()
    stream.accept(1, 0, [7, 8])
    assert stream.accept(1, 0, [7], FinishReason.STOP) is Verdict.DUPLICATE
    assert stream.finish_reason is None


def test_the_limit_holds_whatever_an_instance_does() -> None:
    stream = started(max_output_tokens=3)
    assert stream.accept(1, 0, [1, 2, 3, 4, 5]) is Verdict.END
    assert stream.token_ids == [1, 2, 3]
    assert stream.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("token_ids", "eos", "reason"),
    [
        ([], {2}, None),
        ([5], {2}, None),
        ([5, 2], {2}, FinishReason.STOP),
        ([2, 5], {2}, None),
        ([5, 2], set(), None),
        ([5, 6, 7, 8], {2}, FinishReason.LENGTH),
    ],
)
def test_tokens_may_say_that_the_sequence_has_ended(
    token_ids: list[int], eos: set[int], reason: FinishReason | None
) -> None:
    stream = started(max_output_tokens=4)
    stream.accept(1, 0, token_ids)
    assert stream.implied_finish(frozenset(eos)) is reason


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int, list[int], bool]]]:
    """A sequence that several owners generate in turn, and messages about it: every message an owner sent, in any
    order, any number of times. An owner begins where any earlier point of the sequence was known."""
    tokens = draw(st.lists(st.integers(0, 9), min_size=1, max_size=24))
    messages = []
    for epoch in range(1, draw(st.integers(1, 4)) + 1):
        start = draw(st.integers(0, len(tokens) - 1))
        while start < len(tokens):
            size = draw(st.integers(1, len(tokens) - start))
            end = start + size == len(tokens)
            messages.append((epoch, start, tokens[start : start + size], end))
            start += size
    return tokens, draw(st.lists(st.sampled_from(messages), max_size=60))


@given(histories())
def test_tokens_are_a_prefix_of_the_sequence_always(
    history: tuple[list[int], list[tuple[int, int, list[int], bool]]],
) -> None:
    tokens, messages = history
    stream = started(max_output_tokens=len(tokens) + 1)
    for epoch, offset, token_ids, end in messages:
        before, epoch_before = list(stream.token_ids), stream.epoch
        verdict = stream.accept(epoch, offset, token_ids, FinishReason.STOP if end else None)
        assert stream.token_ids == tokens[: len(stream.token_ids)]
        assert stream.token_ids[: len(before)] == before
        assert stream.epoch >= epoch_before
        if verdict is Verdict.NEW:
            assert len(stream.token_ids) > len(before)
        if verdict in (Verdict.STALE, Verdict.GAP, Verdict.DUPLICATE):
            assert stream.token_ids == before
        if stream.finish_reason is not None:
            assert stream.token_ids == tokens


@given(histories(), st.data())
def test_recovery_at_each_gap_completes_the_sequence(
    history: tuple[list[int], list[tuple[int, int, list[int], bool]]], data: st.DataObject
) -> None:
    """After any past, a new owner that begins at the accepted tokens, heard in order but with repeats, completes it."""
    tokens, messages = history
    stream = started(max_output_tokens=len(tokens) + 1)
    for epoch, offset, token_ids, end in messages:
        stream.accept(epoch, offset, token_ids, FinishReason.STOP if end else None)
    epoch = stream.epoch + 1
    while stream.finish_reason is None:
        stream.begin(epoch)
        start = data.draw(st.integers(0, len(stream.token_ids)))
        stop = min(len(tokens), len(stream.token_ids) + data.draw(st.integers(1, 5)))
        stream.accept(epoch, start, tokens[start:stop], FinishReason.STOP if stop == len(tokens) else None)
    assert stream.token_ids == tokens
