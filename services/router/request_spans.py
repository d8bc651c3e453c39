"""What a request's span says of it: what was asked for, how it ended, and that it was refused.

Owns the attributes of ``starmesh.generate``, by OpenTelemetry's conventions for generative AI. No text of a client's is
among them: neither prompts nor stop strings, nor the messages of errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind

from services.router.flight import Flight
from starmesh.rpc.status import StatusError
from starmesh.telemetry import names
from starmesh.telemetry.setup import note_failure, tracer
from starmesh.v1 import inference_pb2

PROVIDER = "starmesh"
_SAMPLING = {
    "max_output_tokens": names.MAX_TOKENS,
    "temperature": names.TEMPERATURE,
    "top_p": names.TOP_P,
    "top_k": names.TOP_K,
    "seed": names.SEED,
}


def operation(request: inference_pb2.GenerateRequest) -> str:
    """What OpenTelemetry calls what a request asks for."""
    return "chat" if request.WhichOneof("input") == "chat" else "text_completion"


def asked_attributes(request: inference_pb2.GenerateRequest, model: str) -> dict[str, str | int | float]:
    """What a request asks of ``model``, as far as it says."""
    attributes: dict[str, str | int | float] = {
        names.OPERATION: operation(request),
        names.PROVIDER: PROVIDER,
        names.MODEL: model,
        names.OUTPUT_TYPE: "text",
    }
    set_fields = {field.name: value for field, value in request.sampling.ListFields()}
    return attributes | {name: set_fields[field] for field, name in _SAMPLING.items() if field in set_fields}


@contextmanager
def refusals_noted(request: inference_pb2.GenerateRequest, model: str, parent: Context) -> Iterator[None]:
    """A request that is refused within the context has a span of its own: it will have no other."""
    try:
        yield
    except StatusError as error:
        span = tracer().start_span(names.SPAN_GENERATE, parent, kind=SpanKind.SERVER)
        if span.is_recording():
            span.set_attributes(asked_attributes(request, model))
            # What is wrong with a bad request may be its id.
            if request.request_id and error.code is not grpc.StatusCode.INVALID_ARGUMENT:
                span.set_attribute(names.REQUEST_ID, request.request_id)
            note_failure(span, error.code.name)
        span.end()
        raise


def note_end(span: Span, flight: Flight, model: str) -> None:
    """How far the request came, and how it ended if it has."""
    span.set_attribute(names.RESPONSE_MODEL, model)
    span.set_attribute(names.INPUT_TOKENS, flight.prompt_tokens)
    span.set_attribute(names.CACHED_TOKENS, flight.cached_tokens)
    span.set_attribute(names.OUTPUT_TOKENS, len(flight.stream.token_ids))
    span.set_attribute(names.RECOVERIES, flight.recoveries)
    span.set_attribute(names.MIGRATIONS, flight.migrations)
    if flight.stream.finish_reason is not None:
        span.set_attribute(names.FINISH_REASONS, [flight.stream.finish_reason.value])
    if flight.error is not None:
        note_failure(span, flight.error.code.name)
