"""What chat and text completions have in common in a request: sampling, choices, streaming, and fields of our own.

Owns types and what the wire can hold. The ranges of sampling are the router's (``validation``): the same for gRPC.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from services.router.http.errors import invalid
from services.router.http.support import Ignored, Refused
from starmesh.types import MAX_REQUEST_ID_LENGTH
from starmesh.v1 import inference_pb2, sequence_pb2

MAX_CHOICES: Final = 16
MAX_STOPS: Final = 4

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
STRICT: Final = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
"""Numbers are no strings, and fields that nobody knows are found by ``check_known``."""


def _kind_of_stop(value: Any) -> str | None:
    return "<string>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
    Discriminator(
        _kind_of_stop, custom_error_type="stop_type", custom_error_message="should be a string or a list of strings"
    ),
]


class StreamOptions(BaseModel):
    """How a stream is to be."""

    model_config = STRICT

    include_usage: bool | None = Field(None, description="Send one more chunk before the end, with the usage.")
    include_obfuscation: Annotated[bool | None, Ignored()] = Field(None, description="Chunks are never padded.")


class GenerationFields(BaseModel):
    """The fields of both."""

    model_config = STRICT

    model: str | None = Field(None, max_length=256, description="The served model's id; without it, that one.")
    temperature: float | None = Field(None, description="0 to 2; 0 is greedy decoding. Default 1.")
    top_p: float | None = Field(None, description="Over 0 to 1. Default 1.")
    seed: Int64 | None = Field(None, description="The same seed, prompt and model give the same answer; else drawn.")
    stop: Stop | None = Field(None, description="A string, or up to 4, that end the answer and are no part of it.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Answers to make, 1 to 16. Default 1.")
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    presence_penalty: Annotated[float | None, Refused(0.0, why="use repetition_penalty")] = None
    frequency_penalty: Annotated[float | None, Refused(0.0, why="use repetition_penalty")] = None
    logit_bias: Annotated[Any, Refused({}, why="the engine has no logit bias")] = None
    user: Annotated[str | None, Ignored()] = None

    top_k: Int32 | None = Field(None, description="Ours: keeps the k likeliest tokens; 0, the default, all.")
    repetition_penalty: float | None = Field(None, description="Ours: over 0 to 10, for tokens seen. Default 1: none.")
    ignore_eos: bool | None = Field(None, description="Ours: go on past the end of the sequence.")
    priority: Int32 | None = Field(None, description="Ours: -100 to 100, higher first among waiting requests.")
    request_id: str | None = Field(
        None, max_length=MAX_REQUEST_ID_LENGTH, description="Ours: names the request; else X-Request-Id does."
    )

    params: ClassVar[dict[str, str]] = {}
    """Names of the router's fields that are not called here as there."""

    @model_validator(mode="after")
    def _check_known(self) -> GenerationFields:
        check_known(self, "")
        if self.stream_options is not None:
            check_known(self.stream_options, "stream_options.")
            if not self.stream:
                raise invalid("stream_options", "is only allowed with stream: true")
        return self

    @property
    def choices(self) -> int:
        """Answers to make for each prompt."""
        return self.n or 1

    def count(self) -> int:
        """Requests to the router that it asks for; nothing of the prompt is copied before they are known to be few.
        Raises RequestRefused for too many."""
        return self.choices

    @property
    def includes_usage(self) -> bool:
        """Whether a stream is to end with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def param_of(self, field: str) -> str:
        """The client's name of a field of GenerateRequest."""
        name, bracket, index = field.partition("[")
        if name == "sampling.stop_strings":
            return "stop" + (bracket + index if isinstance(self.stop, list) else "")
        return self.params.get(name, name.removeprefix("sampling.")) + bracket + index

    def base_request(self, *, choice: int, max_output_tokens: int | None) -> inference_pb2.GenerateRequest:
        """The request to the router for one choice of a prompt, but for the prompt and the id."""
        sampling = sequence_pb2.SamplingParams(
            max_output_tokens=max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            stop_strings=[self.stop] if isinstance(self.stop, str) else self.stop or (),
            # Each choice differs, and all of them are the same the next time.
            seed=None if self.seed is None else _wrapped(self.seed + choice),
            ignore_eos=bool(self.ignore_eos),
        )
        return inference_pb2.GenerateRequest(
            model=self.model or "", sampling=sampling, priority=0 if self.priority is None else self.priority
        )


def check_known(model: BaseModel, prefix: str) -> None:
    """Raise RequestRefused for a field that nobody knows: a typing error shall not go unnoticed."""
    for name in model.model_extra or ():
        shown = name if name.isidentifier() and len(name) <= 64 else "a field"
        raise invalid(f"{prefix}{shown}", "is not a parameter that is known here", "unknown_parameter")


def _wrapped(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63


FinishReason = Literal["stop", "length"]
