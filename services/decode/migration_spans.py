"""The spans of a migration: both ends and every pull are in the request's own trace, whatever moved it.

The source's span is linked to the round or command that decided the move, which is a trace of its own.
"""

from __future__ import annotations

from opentelemetry.trace import Span, set_span_in_context

from services.decode.migration_progress import MigrationProgress
from starmesh.migration.target_record import TargetEnd
from starmesh.migration.terms import Terms
from starmesh.telemetry import names
from starmesh.telemetry.setup import context_of, links_to, tracer
from starmesh.transfer import PullResult


def begin_source(terms: Terms, *, request: str, command: str) -> Span:
    """``request`` and ``command`` are the trace contexts of the request and of what decided the move."""
    return tracer().start_span(
        names.SPAN_MIGRATION_SOURCE,
        context_of(request),
        links=links_to(command),
        attributes={
            names.REQUEST_ID: terms.request_id,
            names.EPOCH: terms.epoch,
            names.INSTANCE_ID: terms.source_id,
            names.TARGET_INSTANCE: terms.target_id,
            names.MIGRATION_REASON: terms.reason.value,
        },
    )


def end_source(span: Span, how: MigrationProgress) -> None:
    """End the source's span with the migration's outcome."""
    span.set_attribute(names.MIGRATION_OUTCOME, how.state.name.lower())
    why = how.refusal or how.cause
    if why is not None:
        span.set_attribute(names.MIGRATION_CAUSE, why.value)
    span.set_attribute(names.MIGRATION_ROUNDS, how.rounds)
    span.set_attribute(names.TRANSFER_BYTES, how.transfer_bytes)
    span.set_attribute(names.MIGRATION_FROZEN_S, how.frozen_s)
    span.end()


def begin_target(terms: Terms, *, parent: str) -> Span:
    """``parent`` is the trace context of the source's span, or of the request where the source has none."""
    return tracer().start_span(
        names.SPAN_MIGRATION_TARGET,
        context_of(parent),
        attributes={
            names.REQUEST_ID: terms.request_id,
            names.EPOCH: terms.moved.epoch,
            names.INSTANCE_ID: terms.target_id,
            names.SOURCE_INSTANCE: terms.source_id,
            names.MIGRATION_REASON: terms.reason.value,
        },
    )


def end_target(span: Span, end: TargetEnd) -> None:
    """End the target's span."""
    span.set_attribute(names.MIGRATION_OUTCOME, end.state.name.lower())
    span.set_attribute(names.MIGRATION_ROUNDS, end.rounds)
    span.end()


def begin_transfer(terms: Terms, target: Span, *, blocks: int) -> Span:
    """The span of one pull, below the target's."""
    return tracer().start_span(
        names.SPAN_TRANSFER,
        set_span_in_context(target),
        attributes={
            names.REQUEST_ID: terms.request_id,
            names.SOURCE_INSTANCE: terms.source_id,
            names.TRANSFER_BLOCKS: blocks,
        },
    )


def note_transfer(span: Span, result: PullResult) -> None:
    """What a pull that succeeded has moved."""
    span.set_attribute(names.TRANSFER_BACKEND, result.backend.value)
    span.set_attribute(names.TRANSFER_BYTES, result.bytes)
