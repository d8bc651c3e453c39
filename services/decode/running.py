"""One sequence while this instance has it: whose it is, what its router has not heard yet, what bounds it.

Owns state and the messages that tell of it; the worker owns every change, but for the epoch, which a migration raises
when it takes the sequence back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import grpc
from opentelemetry.trace import Span

from services.decode.estimates import is_sound
from services.decode.link import RouterLink
from starmesh.engine.engine import SequenceOutput
from starmesh.rpc import convert
from starmesh.rpc.status import StatusError
from starmesh.telemetry import names
from starmesh.telemetry.setup import context_of, note_failure, tracer
from starmesh.types import FinishReason, Ownership, RemainingEstimate, SequenceSpec
from starmesh.v1 import decode_pb2, sequence_pb2


@dataclass(slots=True, eq=False)
class RunningSequence:
    """``epoch`` is that of its outputs, and ``router_epoch`` the one under which its router started or attached to it:
    a router that has not heard of the newer one cancels by that. ``token_ids`` are all its output tokens, those of
    other instances too. ``link`` is None until a router has come for a sequence that has moved here; what ended it
    meanwhile is ``end``. ``before`` are waited for before blocks are reserved: they end when nothing writes into
    blocks of the request's former epochs any more, and those are free. ``estimate`` is the last one of its remaining
    tokens; one that ``ignores_eos`` goes on to its limit and needs none."""

    request_id: str
    epoch: int
    router_epoch: int
    prompt_tokens: int
    max_tokens: int
    token_ids: list[int]
    link: RouterLink | None
    traceparent: str
    ignores_eos: bool = False
    estimate: RemainingEstimate | None = None
    before: frozenset[asyncio.Future[None]] = field(default_factory=frozenset)
    handoff: asyncio.Task[None] | None = None
    deadline: asyncio.TimerHandle | None = None
    span: Span | None = None
    end: sequence_pb2.SequenceOutput | None = None

    @classmethod
    def of(
        cls,
        spec: SequenceSpec,
        link: RouterLink | None,
        *,
        traceparent: str,
        estimate: RemainingEstimate | None = None,
    ) -> RunningSequence:
        """A sequence that begins here with ``spec``. What comes along as its ``estimate`` counts only if it can be
        that."""
        output_tokens = len(spec.output_token_ids)
        return cls(
            request_id=spec.request_id,
            epoch=spec.epoch,
            router_epoch=spec.epoch,
            prompt_tokens=len(spec.prompt_token_ids),
            max_tokens=len(spec.prompt_token_ids) + spec.sampling.max_output_tokens,
            token_ids=list(spec.output_token_ids),
            link=link,
            traceparent=traceparent,
            ignores_eos=spec.sampling.ignore_eos,
            estimate=estimate if estimate is not None and is_sound(estimate, output_tokens=output_tokens) else None,
        )

    @property
    def tokens(self) -> int:
        """Prompt and output tokens together."""
        return self.prompt_tokens + len(self.token_ids)

    @property
    def in_engine(self) -> bool:
        """Whether its KV is here, so that the engine has it until it ends."""
        return self.handoff is None or self.handoff.done()

    @property
    def remaining_s(self) -> float:
        """Seconds until its deadline."""
        assert self.deadline is not None
        return max(0.0, self.deadline.when() - asyncio.get_running_loop().time())

    def take(self, output: SequenceOutput) -> sequence_pb2.SequenceOutput:
        """Note what a step made of it; the message that tells of it."""
        self.token_ids += output.token_ids
        message = sequence_pb2.SequenceOutput(
            request_id=output.request_id,
            epoch=output.epoch,
            offset=output.offset,
            token_ids=output.token_ids,
            finish_reason=convert.finish_reason_pb(output.finish_reason),
        )
        if output.error is not None:
            message.failure.CopyFrom(StatusError(grpc.StatusCode.ABORTED, output.error).to_sequence_status())
        return message

    def failure(self, error: StatusError) -> sequence_pb2.SequenceOutput:
        """The message that this instance has given it up."""
        return failure(self.request_id, self.epoch, len(self.token_ids), error)

    def cancelled(self) -> sequence_pb2.SequenceOutput:
        """The message that it ends here."""
        return sequence_pb2.SequenceOutput(
            request_id=self.request_id,
            epoch=self.epoch,
            offset=len(self.token_ids),
            finish_reason=sequence_pb2.FINISH_REASON_CANCELLED,
        )

    def since(self, offset: int) -> sequence_pb2.SequenceOutput:
        """All that a router has missed which has ``offset`` tokens, and the end, if it has ended."""
        message = sequence_pb2.SequenceOutput()
        if self.end is not None:
            message.CopyFrom(self.end)
            del message.token_ids[:]
        message.request_id, message.epoch, message.offset = self.request_id, self.epoch, offset
        message.token_ids.extend(self.token_ids[offset:])
        return message

    def moved(self, owner: Ownership, address: str) -> decode_pb2.SequenceMove:
        """The message that it goes on elsewhere."""
        return decode_pb2.SequenceMove(
            request_id=self.request_id,
            epoch=owner.epoch,
            instance_id=owner.instance_id,
            address=address,
            output_tokens=len(self.token_ids),
        )

    def begin_span(self, instance_id: str) -> None:
        """It decodes from now on."""
        self.span = tracer().start_span(
            names.SPAN_DECODE, context_of(self.traceparent), attributes=self.attributes(instance_id)
        )

    def end_span(self, reason: FinishReason | None, *, failed: bool) -> None:
        """It does not any more: it ended for ``reason``, ``failed`` here, or moved."""
        if self.span is not None:
            self.span.set_attribute(names.OUTPUT_TOKENS, len(self.token_ids))
            if reason is not None:
                self.span.set_attribute(names.FINISH_REASONS, [reason.value])
            if failed:
                note_failure(self.span, grpc.StatusCode.ABORTED.name)
            self.span.end()

    def attributes(self, instance_id: str) -> dict[str, str | int]:
        """What all its spans have."""
        return {names.REQUEST_ID: self.request_id, names.EPOCH: self.epoch, names.INSTANCE_ID: instance_id}


@dataclass(frozen=True, slots=True)
class WaitingRouter:
    """A router that has asked for a sequence's tokens from ``offset`` on; the sequence is bounded by ``timeout_s``
    from then on."""

    link: RouterLink
    offset: int
    timeout_s: float


class Sequences(Protocol):
    """The sequences of this instance, as migrations see and change them. What names a request and an epoch does nothing
    when the sequence is not here under that one."""

    @property
    def running(self) -> Mapping[str, RunningSequence]:
        """The sequences that are here, by request, in the order in which they came."""
        ...

    def has_blocks(self, request_id: str) -> bool:
        """Whether a sequence of the request is here, or its blocks are not free yet."""
        ...

    def tell_moved(self, running: RunningSequence, owner: Ownership, address: str, output_tokens: int) -> None:
        """Tell its router where it goes on after how many tokens, and forget it."""
        ...

    def adopt(
        self, spec: SequenceSpec, *, timeout_s: float, traceparent: str, estimate: RemainingEstimate | None
    ) -> None:
        """Take a sequence over that the engine is about to run; its outputs wait for a router. ``estimate`` is the last
        one of its remaining tokens."""
        ...

    def serve(self, request_id: str, epoch: int, waiting: WaitingRouter) -> None:
        """Send its tokens to the router that has come for them."""
        ...

    def give_up(self, request_id: str, epoch: int) -> None:
        """Tell its router that it could not go on here, and forget it."""
        ...

    def forget(self, request_id: str, epoch: int) -> None:
        """Forget it without a word."""
        ...


def failure(request_id: str, epoch: int, offset: int, error: StatusError) -> sequence_pb2.SequenceOutput:
    """The message that this instance gives a sequence up, or does not take it."""
    return sequence_pb2.SequenceOutput(
        request_id=request_id, epoch=epoch, offset=offset, failure=error.to_sequence_status()
    )


def not_here(request_id: str, epoch: int, offset: int) -> sequence_pb2.SequenceOutput:
    """What a router hears that asks for a sequence which is not here."""
    error = StatusError(grpc.StatusCode.NOT_FOUND, f"{request_id} is not here under epoch {epoch}; prefill it again")
    return failure(request_id, epoch, offset, error)
