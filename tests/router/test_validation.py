"""What a client may ask for, field by field."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from services.router.validation import ModelFacts, check_length, check_request
from starmesh.rpc.status import StatusError
from starmesh.v1 import inference_pb2, sequence_pb2

pytestmark = pytest.mark.fast

FACTS = ModelFacts(
    name="tiny", context_tokens=64, vocabulary_tokens=100, eos_token_ids=frozenset({2}), has_chat_template=True
)
SECRET = "swordfish"


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    if not {"text", "chat", "token_ids"} & fields.keys():
        fields["text"] = SECRET
    return inference_pb2.GenerateRequest(**fields)


def sampling(**fields: Any) -> inference_pb2.GenerateRequest:
    return request(sampling=sequence_pb2.SamplingParams(**fields))


def chat(*roles_and_contents: tuple[str, str]) -> inference_pb2.GenerateRequest:
    messages = [inference_pb2.ChatMessage(role=role, content=content) for role, content in roles_and_contents]
    return request(chat=inference_pb2.Chat(messages=messages))


def tokens(*token_ids: int) -> inference_pb2.GenerateRequest:
    return request(token_ids=inference_pb2.TokenIds(token_ids=token_ids))


BAD = [
    (inference_pb2.GenerateRequest(), "input"),
    (request(text=""), "text"),
    (request(text="é" * (2 * 1024 * 1024 + 1)), "text"),
    (chat(), "chat.messages"),
    (chat(("user", ""), ("user", "")), "chat.messages"),
    (chat(*[("user", "x")] * 1025), "chat.messages"),
    (chat(("user", "x"), ("wizard", SECRET)), "chat.messages[1].role"),
    (chat(("user", "x" * (4 * 1024 * 1024 + 1))), "chat.messages"),
    (tokens(), "token_ids.token_ids"),
    (tokens(1, 2, -1), "token_ids.token_ids[2]"),
    (tokens(100), "token_ids.token_ids[0]"),
    (tokens(*[-1] * 64), "token_ids.token_ids"),  # too many are not looked at one by one
    (request(request_id="a b"), "request_id"),
    (request(request_id="x" * 129), "request_id"),
    (request(request_id="ok\n"), "request_id"),
    (request(priority=101), "priority"),
    (request(priority=-101), "priority"),
    (request(coalesce_window=Duration(seconds=1, nanos=1)), "coalesce_window"),
    (request(coalesce_window=Duration(nanos=-1)), "coalesce_window"),
    (sampling(max_output_tokens=0), "sampling.max_output_tokens"),
    (sampling(max_output_tokens=-1), "sampling.max_output_tokens"),
    (sampling(max_output_tokens=65), "sampling.max_output_tokens"),
    (sampling(temperature=-0.1), "sampling.temperature"),
    (sampling(temperature=2.1), "sampling.temperature"),
    (sampling(temperature=float("nan")), "sampling.temperature"),
    (sampling(temperature=float("inf")), "sampling.temperature"),
    (sampling(top_p=0), "sampling.top_p"),
    (sampling(top_p=1.1), "sampling.top_p"),
    (sampling(top_p=float("nan")), "sampling.top_p"),
    (sampling(top_k=-1), "sampling.top_k"),
    (sampling(top_k=101), "sampling.top_k"),
    (sampling(repetition_penalty=0), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=10.5), "sampling.repetition_penalty"),
    (sampling(repetition_penalty=float("nan")), "sampling.repetition_penalty"),
    (sampling(stop_strings=["x"] * 17), "sampling.stop_strings"),
    (sampling(stop_strings=["x", ""]), "sampling.stop_strings[1]"),
    (sampling(stop_strings=["é" * 129]), "sampling.stop_strings[0]"),
]


@pytest.mark.parametrize(("bad", "field"), BAD, ids=[f"{i}-{field}" for i, (_, field) in enumerate(BAD)])
def test_the_field_is_named_and_nothing_is_repeated(bad: inference_pb2.GenerateRequest, field: str) -> None:
    with pytest.raises(StatusError) as caught:
        check_request(bad, FACTS)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.fields == [field]
    assert SECRET not in caught.value.message
    assert "wizard" not in caught.value.message


@pytest.mark.parametrize(
    "good",
    [
        request(model="tiny", request_id="A.b_c:d-9", priority=-100, coalesce_window=Duration(seconds=1)),
        chat(("system", ""), ("user", "hello"), ("assistant", "hi"), ("user", "so?")),
        tokens(0, 99),
        sampling(max_output_tokens=1, temperature=0, top_p=1, top_k=100, repetition_penalty=10),
        sampling(stop_strings=["x" * 256] * 16),
    ],
)
def test_the_limits_themselves_are_allowed(good: inference_pb2.GenerateRequest) -> None:
    check_request(good, FACTS)


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(StatusError) as caught:
        check_request(request(model="other"), FACTS)
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
    assert caught.value.fields == ["model"]
    assert "'tiny'" in caught.value.message


def test_chat_needs_a_template() -> None:
    facts = ModelFacts("tiny", 64, 100, frozenset(), has_chat_template=False)
    with pytest.raises(StatusError, match="no chat template"):
        check_request(chat(("user", "x")), facts)


@pytest.mark.parametrize(
    ("bad", "prompt_tokens", "field", "numbers"),
    [
        (request(), 0, "text", []),
        (request(), 64, "text", ["64", "63"]),
        (chat(("user", "x")), 70, "chat.messages", ["70", "64"]),
        (tokens(*range(65)), 65, "token_ids.token_ids", ["65"]),
        (sampling(max_output_tokens=55), 10, "sampling.max_output_tokens", ["55", "54", "10", "64"]),
    ],
)
def test_what_does_not_fit_is_said_in_numbers(
    bad: inference_pb2.GenerateRequest, prompt_tokens: int, field: str, numbers: list[str]
) -> None:
    with pytest.raises(StatusError) as caught:
        check_length(bad, prompt_tokens, FACTS, seed=1)
    assert caught.value.fields == [field]
    assert all(number in caught.value.message for number in numbers)


def test_defaults_are_decided_here() -> None:
    decided = check_length(request(), 10, FACTS, seed=42)
    assert (decided.max_output_tokens, decided.temperature, decided.top_p, decided.top_k) == (54, 1.0, 1.0, 0)
    assert (decided.repetition_penalty, decided.seed, decided.stop_strings) == (1.0, 42, ())
    chosen = check_length(sampling(seed=-7, temperature=0, max_output_tokens=54), 10, FACTS, seed=42)
    assert (chosen.seed, chosen.temperature, chosen.max_output_tokens) == (-7, 0.0, 54)
