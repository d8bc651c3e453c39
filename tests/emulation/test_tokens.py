"""How a prompt says how long its answer will be, as text, as a conversation and as token ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.emulation.lengths import draw_output_tokens
from starmesh.emulation.requests import emulated_prompt, emulated_request
from starmesh.emulation.tokenizer import EmulatedTokenizer
from starmesh.emulation.tokens import (
    MAX_OUTPUT_TOKENS,
    VOCABULARY_TOKENS,
    ends_at,
    length_token_id,
    output_tokens_of,
)
from starmesh.engine.batch import BatchItem
from starmesh.engine.emulated import EOS_TOKEN_ID, output_token_id
from starmesh.lengths import LENGTH_MODELS
from starmesh.tokenizer import IncrementalDetokenizer, StopMatcher
from starmesh.types import SamplingParams

pytestmark = pytest.mark.fast

TOKENIZER = EmulatedTokenizer(context_tokens=4096, lengths="chat")


def sampling_item(history: list[int], prompt_tokens: int, *, ignore_eos: bool = False) -> BatchItem:
    """The next step of a sequence."""
    sampling = SamplingParams(max_output_tokens=10_000, ignore_eos=ignore_eos)
    return BatchItem(
        "r", history[-1:], len(history) - 1, (0,), sampling=sampling, history=history, prompt_tokens=prompt_tokens
    )


@given(st.integers(1, 3000), st.integers(1, MAX_OUTPUT_TOKENS))
def test_a_text_asks_for_both_lengths(prompt_tokens: int, output_tokens: int) -> None:
    prompt = TOKENIZER.encode(emulated_prompt(prompt_tokens, output_tokens, note="x"))
    assert len(prompt) == prompt_tokens
    assert output_tokens_of(prompt) == output_tokens
    assert all(0 <= token_id < VOCABULARY_TOKENS for token_id in prompt)


@given(st.integers(1, 2000), st.integers(1, MAX_OUTPUT_TOKENS), st.text("abc", min_size=1, max_size=8))
def test_a_request_is_the_same_by_token_ids(prompt_tokens: int, output_tokens: int, request_id: str) -> None:
    request = emulated_request(prompt_tokens, output_tokens, request_id=request_id)
    token_ids = list(request.token_ids.token_ids)
    assert len(token_ids) == prompt_tokens
    assert output_tokens_of(token_ids) == output_tokens
    assert not request.sampling.HasField("max_output_tokens")
    assert list(emulated_request(prompt_tokens, 5, request_id=request_id).token_ids.token_ids[:-1]) == token_ids[:-1]


def test_requests_of_different_ids_do_not_begin_alike() -> None:
    firsts = {tuple(emulated_request(64, 9, request_id=f"r{n}").token_ids.token_ids[:16]) for n in range(200)}
    assert len(firsts) == 200


@pytest.mark.parametrize(("prompt_tokens", "output_tokens"), [(0, 5), (5, 0), (5, MAX_OUTPUT_TOKENS + 1)])
def test_lengths_that_cannot_be_are_refused(prompt_tokens: int, output_tokens: int) -> None:
    with pytest.raises(ValueError, match="has"):
        emulated_request(prompt_tokens, output_tokens, request_id="r")


def test_an_ordinary_text_has_a_token_for_each_four_bytes_and_a_length_of_its_own() -> None:
    prompt = TOKENIZER.encode("Why is the sky blue?")
    assert len(prompt) == 5 + 1
    assert prompt == TOKENIZER.encode("Why is the sky blue?")
    lengths = [output_tokens_of(TOKENIZER.encode(f"prompt {number}")) for number in range(200)]
    assert len(set(lengths)) > 100


@pytest.mark.parametrize("text", ["emulate prompt_tokens=9999999 output_tokens=7", "x" * 40_000])
def test_a_prompt_beyond_the_context_is_no_longer_than_it_takes_to_be_refused(text: str) -> None:
    prompt = TOKENIZER.encode(text)
    assert len(prompt) == 4096 + 1
    assert output_tokens_of(prompt) is not None


def test_texts_that_begin_alike_share_their_first_tokens() -> None:
    begin = "A system prompt that all requests have. " * 8
    first, second = TOKENIZER.encode(begin + "One question"), TOKENIZER.encode(begin + "Quite another one")
    assert first[: len(begin) // 4] == second[: len(begin) // 4]


def test_the_last_message_of_a_conversation_counts() -> None:
    def said(*contents: str) -> list[int]:
        return TOKENIZER.encode_chat([{"role": "user", "content": content} for content in contents])

    assert TOKENIZER.has_chat_template
    prompt = said("emulate output_tokens=7", "emulate output_tokens=70 please")
    assert output_tokens_of(prompt) == 70
    assert len(prompt) > len(said("emulate output_tokens=7"))


@pytest.mark.parametrize("model", sorted(LENGTH_MODELS))
def test_drawn_lengths_follow_their_model(model: str) -> None:
    drawn = np.array([draw_output_tokens(model, f"{number}".encode()) for number in range(4000)])
    ends = {tokens: part for part, tokens in LENGTH_MODELS[model].outputs.points}  # of a mass, all of it
    for tokens, part in ends.items():
        assert np.mean(drawn <= tokens) == pytest.approx(part, abs=0.03)
    assert drawn.max() <= LENGTH_MODELS[model].cap_tokens


def test_a_sequence_ends_after_as_many_tokens_as_its_prompt_says() -> None:
    prompt = [5, 6, length_token_id(4)]
    for history in (prompt, [*prompt, 8, 9]):
        assert ends_at(sampling_item(history, len(prompt))) == 7
        assert ends_at(sampling_item(history, len(prompt), ignore_eos=True)) > 1 << 40
    assert ends_at(sampling_item([5, 6, 7, length_token_id(4)], 3)) > 1 << 40, "an output token says nothing"


def test_an_answer_reads_as_the_positions_of_its_tokens() -> None:
    token_ids = [*(output_token_id(position) for position in range(997, 1003)), EOS_TOKEN_ID]
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    text = "".join(detokenizer.feed([token_id]) for token_id in token_ids) + detokenizer.finish()
    assert text == TOKENIZER.decode(token_ids) == " 997 998 999 0 1 2"


def test_stop_strings_stop() -> None:
    matcher = StopMatcher(TOKENIZER, ("99 10",))
    assert [matcher.feed(output_token_id(position)) for position in (98, 99, 100)] == [False, False, True]
