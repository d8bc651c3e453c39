"""The events of streams, held to the models that describe them and to those of OpenAI's client."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as OpenAiCompletion
from openai.types.chat import ChatCompletion as OpenAiChatCompletion
from openai.types.chat import ChatCompletionChunk as OpenAiChunk

from services.router.http.answers import ChatCompletionChunk, CompletionChunk, PromptTokensDetails, Usage
from services.router.http.formats import ChatFormat, CompletionFormat, Identity, Whole
from starmesh.types import FinishReason

pytestmark = pytest.mark.fast

IDENTITY = Identity(request_id="r", created=7, model='a "model"', fingerprint="fp_0")
USAGE = Usage(
    prompt_tokens=3,
    completion_tokens=4,
    total_tokens=7,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=2),
)


def events(text: str) -> list[str]:
    """The data of each event."""
    parts = text.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts)
    return [part.removeprefix("data: ") for part in parts]


@given(st.text(), st.booleans(), st.integers(0, 15))
def test_chat_chunks(text: str, includes_usage: bool, index: int) -> None:
    text = text.encode("utf-8", "replace").decode()
    format_ = ChatFormat(IDENTITY, includes_usage=includes_usage)
    (opening,) = events(format_.opening(index))
    (delta,) = events(format_.text(index, text))
    (ending,) = events(format_.ending(index, FinishReason.STOP))
    for data in (opening, delta, ending):
        ChatCompletionChunk.model_validate_json(data, extra="forbid")
        OpenAiChunk.model_validate_json(data)
        assert data.isascii()
        assert ("usage" in json.loads(data)) == includes_usage
    assert json.loads(opening)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    choice = json.loads(delta)["choices"][0]
    assert choice == {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    choice = json.loads(ending)["choices"][0]
    assert choice == {"index": index, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert json.loads(delta)["model"] == IDENTITY.model


@given(st.text(), st.booleans())
def test_completion_chunks(text: str, includes_usage: bool) -> None:
    text = text.encode("utf-8", "replace").decode()
    format_ = CompletionFormat(IDENTITY, includes_usage=includes_usage)
    assert format_.opening(0) == ""
    (delta,) = events(format_.text(0, text))
    (ending,) = events(format_.ending(0, FinishReason.LENGTH))
    for data in (delta, ending):
        CompletionChunk.model_validate_json(data, extra="forbid")
    assert json.loads(delta)["choices"][0]["text"] == text
    assert json.loads(ending)["choices"][0]["finish_reason"] == "length"


def test_the_usage_comes_without_choices() -> None:
    for format_ in (ChatFormat(IDENTITY, includes_usage=True), CompletionFormat(IDENTITY, includes_usage=True)):
        (data,) = events(format_.usage(USAGE))
        assert json.loads(data)["choices"] == []
        assert Usage.model_validate(json.loads(data)["usage"]) == USAGE


def test_whole_answers_are_what_openais_client_knows() -> None:
    wholes = [Whole("a", FinishReason.STOP), Whole("b", FinishReason.LENGTH)]
    chat = ChatFormat(IDENTITY, includes_usage=False).whole(wholes, USAGE)
    read = OpenAiChatCompletion.model_validate_json(chat.model_dump_json())
    assert [choice.message.content for choice in read.choices] == ["a", "b"]
    completion = CompletionFormat(IDENTITY, includes_usage=False).whole(wholes, USAGE)
    text = OpenAiCompletion.model_validate_json(completion.model_dump_json())
    assert [(choice.index, choice.text, choice.finish_reason) for choice in text.choices] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
