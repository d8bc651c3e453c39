"""What callers send, checked and in columns: the wire's side of a call.

Owns the limits of a message. Owns no answer to it, and does not know which predictor will give one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import grpc
import numpy as np
import numpy.typing as npt

from starmesh.prediction.batch import Integers
from starmesh.rpc import convert
from starmesh.rpc.status import bad_field
from starmesh.types import MAX_REQUEST_ID_LENGTH, FinishReason, HiddenLayout
from starmesh.v1 import predictor_pb2

MAX_SAMPLES: Final = 1024
MAX_ENDS: Final = 1024
MAX_LAYERS: Final = 16
MAX_WIDTH: Final = 1 << 16
_MAX_REVISION_LENGTH: Final = 256

_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_LENGTH}}}")


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of a call, n of them, at least one. ``hidden_states`` is [n, layers, width] float16,
    ``prompt_tokens`` and ``output_tokens`` are [n]. ``traceparents`` are the requests' trace contexts, as sent."""

    layout: HiddenLayout
    request_ids: tuple[str, ...]
    hidden_states: npt.NDArray[np.float16]
    prompt_tokens: Integers
    output_tokens: Integers
    traceparents: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.request_ids)


@dataclass(frozen=True, slots=True)
class End:
    """A sequence that has ended with ``output_tokens``; ``finished`` when the model itself ended it, ``cancelled`` when
    neither it nor a limit did."""

    request_id: str
    output_tokens: int
    finished: bool
    cancelled: bool = False


def samples_of(request: predictor_pb2.PredictRequest) -> Samples | None:
    """None when there are none. Raises StatusError naming the field that is out of its limits."""
    _check_count("samples", len(request.samples), MAX_SAMPLES)
    if not request.samples:
        return None
    layout = _layout(request.layout)
    seen: set[tuple[str, int]] = set()
    for index, sample in enumerate(request.samples):
        field = f"samples[{index}]"
        _check_id(f"{field}.request_id", sample.request_id)
        _check_tokens(f"{field}.prompt_tokens", sample.prompt_tokens)
        _check_tokens(f"{field}.output_tokens", sample.output_tokens)
        if len(sample.hidden_state) != layout.state_bytes:
            raise bad_field(
                f"{field}.hidden_state",
                f"has {len(sample.hidden_state)} bytes; {len(layout.layers)} layers of width {layout.width} in float16 "
                f"take {layout.state_bytes}",
            )
        position = (sample.request_id, sample.output_tokens)
        if position in seen:
            raise bad_field(field, f"is the second of {sample.request_id} at {sample.output_tokens} tokens; send one")
        seen.add(position)
    count = len(request.samples)
    states = np.frombuffer(b"".join(sample.hidden_state for sample in request.samples), dtype="<f2")
    finite = np.isfinite(states).reshape(count, -1).all(axis=1)
    if not finite.all():
        # One would spoil its sequence's average, and a predictor trained with it.
        raise bad_field(f"samples[{int(finite.argmin())}].hidden_state", "holds numbers that are not finite")
    return Samples(
        layout,
        tuple(sample.request_id for sample in request.samples),
        hidden_states=states.reshape(count, len(layout.layers), layout.width),
        prompt_tokens=np.array([sample.prompt_tokens for sample in request.samples], dtype=np.int64),
        output_tokens=np.array([sample.output_tokens for sample in request.samples], dtype=np.int64),
        traceparents=tuple(sample.traceparent for sample in request.samples),
    )


def ends_of(request: predictor_pb2.PredictRequest) -> tuple[End, ...]:
    """Raises StatusError naming the field that is out of its limits."""
    _check_count("ends", len(request.ends), MAX_ENDS)
    ends = []
    for index, end in enumerate(request.ends):
        _check_id(f"ends[{index}].request_id", end.request_id)
        _check_tokens(f"ends[{index}].output_tokens", end.output_tokens)
        reason = convert.finish_reason(end.finish_reason)
        if reason is None:
            raise bad_field(f"ends[{index}].finish_reason", "is not set; say why the sequence ended")
        finished, cancelled = reason is FinishReason.STOP, reason is FinishReason.CANCELLED
        ends.append(End(end.request_id, end.output_tokens, finished, cancelled))
    return tuple(ends)


def _layout(message: predictor_pb2.HiddenLayout) -> HiddenLayout:
    if not 1 <= len(message.model_revision) <= _MAX_REVISION_LENGTH:
        raise bad_field("layout.model_revision", f"must be 1 to {_MAX_REVISION_LENGTH} characters")
    layers = list(message.layers)
    if not 1 <= len(layers) <= MAX_LAYERS or layers != sorted(set(layers)) or layers[0] < 0:
        raise bad_field("layout.layers", f"must be 1 to {MAX_LAYERS} ascending counts of layers")
    if not 1 <= message.width <= MAX_WIDTH:
        raise bad_field("layout.width", f"must be 1 to {MAX_WIDTH}, not {message.width}")
    return convert.hidden_layout(message)


def _check_count(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise bad_field(field, f"has {count} entries; send at most {limit}, and the rest in another call")


def _check_id(field: str, value: str) -> None:
    if not _ID.fullmatch(value):
        raise bad_field(field, f"must be 1 to {MAX_REQUEST_ID_LENGTH} of the characters A-Z a-z 0-9 . _ : -")


def _check_tokens(field: str, count: int) -> None:
    if count < 0:
        raise bad_field(field, f"is {count}; it counts tokens")


def check_fits(layout: HiddenLayout, expected: HiddenLayout | None, version: str) -> None:
    """Demand samples of the model that a predictor is for, with at least the layers that it looks at; any for None.
    Raises StatusError naming the field and both values."""
    if expected is None or expected.within(layout):
        return
    pairs: tuple[tuple[str, object, object, bool], ...] = (
        ("model_revision", layout.model_revision, expected.model_revision, False),
        ("width", layout.width, expected.width, False),
        ("layers", list(layout.layers), list(expected.layers), True),
    )
    field, sent, wanted, _ = next(pair for pair in pairs if pair[3] or pair[1] != pair[2])
    raise bad_field(
        f"layout.{field}",
        f"is {sent}, but predictor {version} takes {wanted}; promote one for this model, or conditional_median",
        code=grpc.StatusCode.FAILED_PRECONDITION,
    )
