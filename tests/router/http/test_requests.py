"""Bodies to requests of the router, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from services.router.http.body import MAX_VALUES, _check_values
from services.router.http.chat_request import ChatRequest
from services.router.http.completion_request import CompletionRequest
from services.router.http.errors import RequestRefused, from_validation

pytestmark = pytest.mark.fast

MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate_json(json.dumps({"messages": MESSAGES} | fields))


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate_json(json.dumps({"prompt": "hi"} | fields))


def refusal(make: Any, **fields: Any) -> tuple[str | None, str | None]:
    """The param and code of a body that is refused."""
    with pytest.raises((ValidationError, RequestRefused)) as caught:
        make(**fields)
    refused = from_validation(caught.value) if isinstance(caught.value, ValidationError) else caught.value
    assert refused.status == 400
    error = refused.body.error
    assert error.param is None or error.message.startswith(f"{error.param}: ")
    return error.param, error.code


def test_a_chat_becomes_requests_that_differ_in_their_seed_only() -> None:
    requests = chat(n=3, seed=2**63 - 2, temperature=0.5, top_p=0.9, stop="x", max_tokens=7, priority=-3).requests()
    assert [request.sampling.seed for request in requests] == [2**63 - 2, 2**63 - 1, -(2**63)]
    for request in requests:
        request.sampling.ClearField("seed")
    assert requests[0] == requests[1] == requests[2]
    sampling = requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_output_tokens) == (0.5, 0.9, 7)
    assert list(sampling.stop_strings) == ["x"]
    assert requests[0].priority == -3
    assert [(message.role, message.content) for message in requests[0].chat.messages] == [("user", "hi")]


def test_what_is_not_asked_for_is_left_to_the_router() -> None:
    (request,) = chat().requests()
    assert request.sampling.ListFields() == []
    assert (request.model, request.request_id, request.priority) == ("", "", 0)


def test_nulls_mean_nothing() -> None:
    nulls = {name: None for name in ChatRequest.model_fields if name != "messages"}
    assert chat(**nulls).requests() == chat().requests()
    nulls = {name: None for name in CompletionRequest.model_fields if name != "prompt"}
    assert completion(**nulls).requests() == completion().requests()


def test_roles_and_parts() -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "hi", "name": "me"},
        {"role": "assistant", "content": "ho", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    (request,) = chat(messages=messages).requests()
    assert [(message.role, message.content) for message in request.chat.messages] == [
        ("system", "be\nbrief"),
        ("user", "hi"),
        ("assistant", "ho"),
    ]


def test_the_newer_limit_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=6).requests()[0].sampling.max_output_tokens == 6


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["hi", "ho"], ["hi", "ho"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts_of_every_kind(prompt: Any, expected: list[Any]) -> None:
    requests = completion(prompt=prompt, n=2).requests()
    sent = [request.text or list(request.token_ids.token_ids) for request in requests]
    assert sent == [one for one in expected for _ in range(2)]
    assert all(request.sampling.max_output_tokens == 16 for request in requests)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls", None),
        ({"messages": MESSAGES * 1025}, "messages", "invalid_value"),
        ({"model": 7}, "model", "invalid_type"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": 2**31}, "max_tokens", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": {}}, "stop", "invalid_type"),
        ({"stop": [1]}, "stop[0]", "invalid_type"),
        ({"stream": 1}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"top_logprobs": 3}, "top_logprobs", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"sneaky\nname": 1}, "a field", "unknown_parameter"),
    ],
)
def test_what_a_chat_may_not_ask(fields: dict[str, Any], param: str, code: str | None) -> None:
    found = refusal(chat, **fields)
    assert found == (param, code or found[1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [[1], "a"]}, "prompt[1]"),
        ({"prompt": [[1, True]]}, "prompt[0][1]"),
        ({"prompt": [2**31]}, "prompt[0]"),
        ({"prompt": ["a"] * 17}, "prompt"),
        ({"logprobs": 1}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_what_a_completion_may_not_ask(fields: dict[str, Any], param: str) -> None:
    assert refusal(completion, **fields)[0] == param


def test_prompts_times_choices_are_bounded() -> None:
    with pytest.raises(RequestRefused, match="n: asks for 18"):
        completion(prompt=["a"] * 9, n=2).count()


def test_neutral_values_of_refused_fields_are_taken() -> None:
    chat(
        tools=[], tool_choice="auto", logprobs=False, top_logprobs=0, response_format={"type": "text"}, logit_bias={},
        presence_penalty=0, frequency_penalty=0.0, modalities=["text"], verbosity="medium", user="me",
        metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True,
    )  # fmt: skip
    completion(echo=False, suffix="", best_of=1)


def test_not_a_number_is_no_number() -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate_json('{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}')


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("sampling.max_output_tokens", "max_tokens"),
        ("sampling.temperature", "temperature"),
        ("sampling.stop_strings[0]", "stop"),
        ("chat.messages[3].role", "messages[3].role"),
        ("chat.messages", "messages"),
        ("model", "model"),
    ],
)
def test_the_routers_fields_have_the_clients_names(field: str, param: str) -> None:
    assert chat(stop="x").param_of(field) == param


def test_the_names_are_those_that_the_client_used() -> None:
    assert chat(max_completion_tokens=3).param_of("sampling.max_output_tokens") == "max_completion_tokens"
    assert chat(stop=["x", ""]).param_of("sampling.stop_strings[1]") == "stop[1]"
    assert completion().param_of("token_ids.token_ids[4]") == "prompt[4]"
    assert completion().param_of("text") == "prompt"


def test_many_values_are_refused_and_a_long_table_in_a_text_is_not() -> None:
    table = json.dumps({"prompt": '[{,"\\' * MAX_VALUES}).encode()
    _check_values(table)
    with pytest.raises(RequestRefused, match="values"):
        _check_values(b'{"prompt":[' + b"1," * MAX_VALUES + b"1]}")


@pytest.mark.parametrize("piece", [b'"', b'\\"', b'"\\', b'\\\\"'])
def test_strings_that_never_end_are_read_once(piece: bytes) -> None:
    """A search that began anew at each quote would take hours."""
    with pytest.raises(RequestRefused, match="values"):
        _check_values(b"," * (MAX_VALUES + 1) + b'"' + piece * 100_001)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from(sorted(set(ChatRequest.model_fields) | set(CompletionRequest.model_fields) | {"x", ""}))


@settings(max_examples=40)
@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
@given(fields=st.dictionaries(FIELDS, JSON, max_size=6))
def test_any_json_is_taken_or_refused(model: Any, fields: dict[str, Any]) -> None:
    """And what is taken fits into the router's request."""
    try:
        body = model.model_validate_json(json.dumps(fields))
        for request in body.requests():
            request.SerializeToString()
    except ValidationError as error:
        assert from_validation(error).status == 400
    except RequestRefused as error:
        assert error.status == 400
