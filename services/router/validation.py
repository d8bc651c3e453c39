"""What a client may ask for: a GenerateRequest against the model's facts, or an error that names the field. Pure.

Owns every limit of the public API and the defaults of sampling. Owns no tokenising: ``check_request`` comes before
it, ``check_length`` after it. No message repeats the client's text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration

from starmesh.rpc import convert
from starmesh.rpc.status import StatusError, bad_field
from starmesh.types import MAX_REQUEST_ID_LENGTH, SamplingParams
from starmesh.v1 import inference_pb2, sequence_pb2

MAX_TEXT_BYTES = 4 * 1024 * 1024
MAX_CHAT_MESSAGES = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_COALESCE_WINDOW_S = 1.0
MAX_RESUME_WINDOW_S = 300.0
MAX_PRIORITY = 100
TOO_LONG = "CONTEXT_LENGTH_EXCEEDED"
"""The reason of requests that do not fit the context."""
ROLES = ("system", "user", "assistant")

_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What limits a request. ``context_tokens`` bounds prompt and output tokens together."""

    name: str
    context_tokens: int
    vocabulary_tokens: int
    eos_token_ids: frozenset[int]
    has_chat_template: bool


def check_request_id(request_id: str, field: str = "request_id") -> None:
    """Raise StatusError unless the id is 1 to 128 of [A-Za-z0-9._:-]."""
    if not _REQUEST_ID.fullmatch(request_id):
        raise bad_field(field, f"must be 1 to {MAX_REQUEST_ID_LENGTH} of the characters A-Z a-z 0-9 . _ : -")


def check_request(request: inference_pb2.GenerateRequest, facts: ModelFacts) -> None:
    """Check all that can be checked before the prompt is tokenised. Raises StatusError."""
    if request.request_id:
        check_request_id(request.request_id)
    if request.model and request.model != facts.name:
        raise _unknown_model(facts.name)
    _check_input(request, facts)
    _check_sampling(request.sampling, facts)
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise bad_field("priority", f"must be {-MAX_PRIORITY} to {MAX_PRIORITY}, not {request.priority}")
    if request.HasField("coalesce_window"):
        duration_in(request.coalesce_window, "coalesce_window", 0.0, MAX_COALESCE_WINDOW_S)
    if request.HasField("resume_window"):
        duration_in(request.resume_window, "resume_window", 0.0, MAX_RESUME_WINDOW_S)
    _check_token_ids("output_token_ids", request.output_token_ids, facts)


def check_length(
    request: inference_pb2.GenerateRequest, prompt_tokens: int, facts: ModelFacts, *, seed: int
) -> SamplingParams:
    """Check that prompt and answer fit the context. Returns the sampling parameters with all defaults decided;
    ``seed`` is the default of the seed. Raises StatusError."""
    field = input_field(request)
    if prompt_tokens == 0:
        raise bad_field(field, "is empty once tokenised; send at least one token")
    room = facts.context_tokens - prompt_tokens
    if room < 1:
        raise _too_long(field, prompt_tokens, facts)
    sampling = request.sampling
    max_output_tokens = room
    if sampling.HasField("max_output_tokens"):
        max_output_tokens = sampling.max_output_tokens
        if max_output_tokens > room:
            raise bad_field(
                "sampling.max_output_tokens",
                f"is {max_output_tokens}, but the context of {facts.context_tokens} tokens leaves {room} after the "
                f"prompt's {prompt_tokens}; leave it unset for as many as fit",
                reason=TOO_LONG,
            )
    if len(request.output_token_ids) > max_output_tokens:
        raise bad_field(
            "output_token_ids",
            f"has {len(request.output_token_ids)} tokens, more than the answer's {max_output_tokens}",
        )
    return SamplingParams(
        max_output_tokens=max_output_tokens,
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        stop_strings=tuple(sampling.stop_strings),
        seed=sampling.seed if sampling.HasField("seed") else seed,
        ignore_eos=sampling.ignore_eos,
    )


def input_field(request: inference_pb2.GenerateRequest) -> str:
    """The field that holds the prompt."""
    return {"text": "text", "chat": "chat.messages", "token_ids": "token_ids.token_ids"}[
        request.WhichOneof("input") or "text"
    ]


def duration_in(duration: Duration, field: str, low_s: float, high_s: float) -> float:
    """The duration in seconds. Raises StatusError naming ``field`` when it is out of range."""
    seconds = convert.duration_s(duration)
    if not low_s <= seconds <= high_s:
        raise bad_field(field, f"must be {low_s:g} s to {high_s:g} s, not {seconds:g} s")
    return seconds


def _check_input(request: inference_pb2.GenerateRequest, facts: ModelFacts) -> None:
    match request.WhichOneof("input"):
        case "text":
            _check_text_bytes("text", len(request.text.encode()))
            if not request.text:
                raise bad_field("text", "is empty; send at least one byte")
        case "chat":
            _check_chat(request.chat, facts)
        case "token_ids":
            token_ids = request.token_ids.token_ids
            if not token_ids:
                raise bad_field("token_ids.token_ids", "is empty; send at least one token")
            _check_token_ids("token_ids.token_ids", token_ids, facts)
        case _:
            raise bad_field("input", "is not set; set one of text, chat and token_ids")


def _check_token_ids(field: str, token_ids: Sequence[int], facts: ModelFacts) -> None:
    # Before the look at each of them: a message holds millions, and the event loop waits meanwhile.
    if len(token_ids) >= facts.context_tokens:
        raise _too_long(field, len(token_ids), facts)
    for index, token_id in enumerate(token_ids):
        if not 0 <= token_id < facts.vocabulary_tokens:
            raise bad_field(f"{field}[{index}]", f"is {token_id}; must be 0 to {facts.vocabulary_tokens - 1}")


def _too_long(field: str, prompt_tokens: int, facts: ModelFacts) -> StatusError:
    return bad_field(
        field,
        f"has {prompt_tokens} tokens, but the context of {facts.context_tokens} tokens must hold the prompt "
        f"and at least one output token; send at most {facts.context_tokens - 1}",
        reason=TOO_LONG,
    )


def _check_chat(chat: inference_pb2.Chat, facts: ModelFacts) -> None:
    if not facts.has_chat_template:
        raise bad_field("chat", "the model has no chat template; send text or token_ids")
    if not chat.messages:
        raise bad_field("chat.messages", "is empty; send at least one message")
    if len(chat.messages) > MAX_CHAT_MESSAGES:
        raise bad_field("chat.messages", f"has {len(chat.messages)} messages; send at most {MAX_CHAT_MESSAGES}")
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise bad_field(f"chat.messages[{index}].role", f"must be one of {', '.join(ROLES)}")
    if not any(message.content for message in chat.messages):
        raise bad_field("chat.messages", "have no text; send at least one byte")
    _check_text_bytes("chat.messages", sum(len(message.content.encode()) for message in chat.messages))


def _check_text_bytes(field: str, text_bytes: int) -> None:
    if text_bytes > MAX_TEXT_BYTES:
        raise bad_field(field, f"has {text_bytes} bytes of text; send at most {MAX_TEXT_BYTES}")


def _check_sampling(sampling: sequence_pb2.SamplingParams, facts: ModelFacts) -> None:
    if sampling.HasField("max_output_tokens"):
        _check_range("max_output_tokens", sampling.max_output_tokens, 1, facts.context_tokens)
    if sampling.HasField("temperature"):
        _check_range("temperature", sampling.temperature, 0, 2)
    if sampling.HasField("top_p"):
        _check_range("top_p", sampling.top_p, 0, 1, open_low=True)
    if sampling.HasField("top_k"):
        _check_range("top_k", sampling.top_k, 0, facts.vocabulary_tokens)
    if sampling.HasField("repetition_penalty"):
        _check_range("repetition_penalty", sampling.repetition_penalty, 0, 10, open_low=True)
    if len(sampling.stop_strings) > MAX_STOP_STRINGS:
        raise bad_field(
            "sampling.stop_strings", f"has {len(sampling.stop_strings)} strings; send at most {MAX_STOP_STRINGS}"
        )
    for index, stop_string in enumerate(sampling.stop_strings):
        size = len(stop_string.encode())
        if not 1 <= size <= MAX_STOP_STRING_BYTES:
            raise bad_field(
                f"sampling.stop_strings[{index}]", f"has {size} bytes; must be 1 to {MAX_STOP_STRING_BYTES}"
            )


def _check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high  # False for NaN
    if not inside or math.isnan(value):
        raise bad_field(f"sampling.{name}", f"must be {'over ' if open_low else ''}{low} to {high}, not {value:g}")


def _unknown_model(served: str) -> StatusError:
    description = f"is not served here; leave it empty or send {served!r}"
    return bad_field("model", description, code=grpc.StatusCode.NOT_FOUND)
