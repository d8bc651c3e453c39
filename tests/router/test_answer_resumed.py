"""However often streams break, and wherever: what a client has of all of them together is what one alone would give."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.answer import Answer
from services.router.stream import TokenStream
from starmesh.tokenizer import IncrementalDetokenizer, ModelTokenizer
from starmesh.types import FinishReason
from tests.test_tokenizer import grouped_tokens

pytestmark = pytest.mark.fast


class Client:
    """Has what came in whole pieces."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None

    def take(self, answer: Answer) -> None:
        piece = answer.take()
        if piece is not None:
            assert piece.offset == len(self.token_ids)
            self.token_ids += piece.token_ids
            self.text += piece.text
            self.finish_reason = piece.finish_reason


def resumed(stream: TokenStream, tokenizer: ModelTokenizer, stops: list[str], offset: int) -> Answer:
    """As the router does it."""
    detokenizer = IncrementalDetokenizer(tokenizer, stops)
    detokenizer.feed(stream.token_ids[:offset])
    return Answer(stream, detokenizer, offset=offset)


@settings(max_examples=60)
@given(
    grouped_tokens(),
    st.lists(st.text("abé th😀", min_size=1, max_size=4), max_size=2),
    st.lists(st.sampled_from(["read", "lose", "break", "wait"]), max_size=30),
)
def test_the_streams_of_a_request_add_up(
    case: tuple[ModelTokenizer, list[list[int]]], stops: list[str], events: list[str]
) -> None:
    tokenizer, groups = case
    stream = TokenStream(max_output_tokens=1000)
    stream.begin(1)
    client = Client()
    answer = resumed(stream, tokenizer, stops, 0)
    coming = iter(groups)
    for event in events:
        if event == "wait":
            if stream.finish_reason is None and (group := next(coming, None)) is not None:
                stream.accept(1, len(stream.token_ids), group)
        elif client.finish_reason is None:
            if event == "read":
                client.take(answer)
            else:
                if event == "lose":
                    answer.take()  # on its way when the connection broke
                answer = resumed(stream, tokenizer, stops, len(client.token_ids))
    stream.end(FinishReason.LENGTH)
    if client.finish_reason is None:
        client.take(answer)
    undisturbed = Client()
    undisturbed.take(resumed(stream, tokenizer, stops, 0))
    assert (client.token_ids, client.text) == (undisturbed.token_ids, undisturbed.text)
    assert client.token_ids == stream.token_ids
    assert client.finish_reason is stream.finish_reason
