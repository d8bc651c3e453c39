"""Pieces for the client: nothing twice, nothing missing, and no half of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.answer import Answer
from services.router.stream import TokenStream
from starmesh.types import FinishReason

pytestmark = pytest.mark.fast


class Letters:
    """Token n is the n-th letter; a stop string of one or two letters is held back as the real one does."""

    def __init__(self, stop: str = "") -> None:
        self.stopped = False
        self._stop = stop
        self._held = ""

    def feed(self, token_ids: list[int]) -> str:
        if self.stopped:
            return ""
        text = self._held + "".join(chr(ord("a") + token_id) for token_id in token_ids)
        self._held = ""
        if self._stop and self._stop in text:
            self.stopped = True
            return text[: text.index(self._stop)]
        if self._stop and text.endswith(self._stop[0]):
            text, self._held = text[:-1], text[-1]
        return text

    def finish(self) -> str:
        held, self._held = self._held, ""
        return "" if self.stopped else held


def answer(stop: str = "", max_output_tokens: int = 100) -> Answer:
    stream = TokenStream(max_output_tokens=max_output_tokens)
    stream.begin(1)
    return Answer(stream, Letters(stop))


def test_nothing_new_is_no_piece() -> None:
    subject = answer()
    assert subject.take() is None
    subject.stream.accept(1, 0, [0, 1])
    piece = subject.take()
    assert piece is not None
    assert (piece.offset, piece.token_ids, piece.text, piece.finish_reason) == (0, [0, 1], "ab", None)
    assert subject.take() is None


def test_the_last_piece_has_what_was_held_back() -> None:
    subject = answer(stop="bx")
    subject.stream.accept(1, 0, [0, 1])
    first = subject.take()
    assert first is not None
    assert first.text == "a"
    subject.stream.accept(1, 2, [], FinishReason.LENGTH)
    last = subject.take()
    assert last is not None
    assert (last.offset, last.token_ids, last.text, last.finish_reason) == (2, [], "b", FinishReason.LENGTH)
    assert subject.take() is None


def test_a_stop_string_ends_the_stream_even_if_no_instance_said_so() -> None:
    subject = answer(stop="bc")
    subject.stream.accept(1, 0, [0, 1, 2])
    assert subject.find_stop()
    piece = subject.take()
    assert piece is not None
    assert (piece.token_ids, piece.text, piece.finish_reason) == ([0, 1, 2], "a", FinishReason.STOP)


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.booleans(), max_size=40), st.sampled_from(["", "b", "ab"]))
def test_pieces_add_up(token_ids: list[int], reads: list[bool], stop: str) -> None:
    subject = answer(stop)
    pieces = []
    feed = iter(token_ids)
    offset = 0
    for read in reads:
        if read:
            pieces.append(subject.take())
        elif (token_id := next(feed, None)) is not None and subject.stream.finish_reason is None:
            subject.stream.accept(1, offset, [token_id])
            offset += 1
    subject.stream.end(FinishReason.LENGTH)
    pieces.append(subject.take())
    given_out = [piece for piece in pieces if piece is not None]
    assert [token for piece in given_out for token in piece.token_ids] == subject.stream.token_ids
    assert [piece.finish_reason is not None for piece in given_out] == [False] * (len(given_out) - 1) + [True]
    whole = "".join(chr(ord("a") + token_id) for token_id in subject.stream.token_ids)
    text = "".join(piece.text for piece in given_out)
    assert text == (whole[: whole.index(stop)] if stop and stop in whole else whole)
    position = 0
    for piece in given_out:
        assert piece.offset == position
        position += len(piece.token_ids)
