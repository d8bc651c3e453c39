"""What an instance demands of a migration's calls, and what they say once it is satisfied. Pure.

A field that is wrong is named; whether the call belongs where the migration stands is the table's to say.
"""

from __future__ import annotations

from services.decode.incoming import RoomAsked
from services.decode.outgoing import MoveAsked
from starmesh.instance.intake import check_sequence
from starmesh.ledger.limits import MAX_COUNT, check_epoch, check_ids
from starmesh.migration.target_record import CommitAsked, CopyAsked
from starmesh.migration.terms import Terms
from starmesh.rpc import convert, convert_migration
from starmesh.rpc.status import bad_field
from starmesh.types import KvLayout, KvTicket, MigrationReason
from starmesh.v1 import decode_pb2, sequence_pb2

# A W3C traceparent has 55 characters, and a newer version of it may have more.
MAX_TRACEPARENT_LENGTH = 128
# A host name has at most 253 characters.
MAX_ADDRESS_LENGTH = 262


def move_asked(request: decode_pb2.MigrateRequest) -> MoveAsked:
    """What a Migrate call asks for. Raises StatusError, naming the field; so do the others."""
    _check_id("request_id", request.request_id)
    _check_epoch("epoch", request.epoch)
    _check_id("target_instance_id", request.target_instance_id)
    _check_address("target_address", request.target_address)
    if not 0 <= request.leader_term <= MAX_COUNT:
        raise bad_field("leader_term", "counts from 1; 0 is nobody's")
    return MoveAsked(
        request_id=request.request_id,
        target_id=request.target_instance_id,
        address=request.target_address,
        reason=_reason(request.reason),
        epoch=request.epoch,
        traceparent=_traceparent(request.traceparent),
        leader_term=request.leader_term,
    )


def room_asked(request: decode_pb2.ReserveMigrationRequest, *, target_id: str, parent: str) -> RoomAsked:
    """What a ReserveMigration call to ``target_id`` asks for; ``parent`` is the trace context of the call."""
    _check_id("reservation_id", request.reservation_id)
    _check_id("request_id", request.request_id)
    _check_epoch("epoch", request.epoch)
    _check_id("source_instance_id", request.source_instance_id)
    if request.source_instance_id == target_id:
        raise bad_field("source_instance_id", "is this instance")
    if request.blocks < 1:
        raise bad_field("blocks", "must be at least 1")
    if request.max_tokens < 0:
        raise bad_field("max_tokens", "must not be negative")
    return RoomAsked(
        terms=Terms(
            reservation_id=request.reservation_id,
            request_id=request.request_id,
            epoch=request.epoch,
            source_id=request.source_instance_id,
            target_id=target_id,
            reason=_reason(request.reason),
        ),
        layout=convert.layout(request.layout),
        blocks=request.blocks,
        max_tokens=request.max_tokens,
        traceparent=_traceparent(request.traceparent),
        parent=parent if len(parent) <= MAX_TRACEPARENT_LENGTH else "",
    )


def copy_asked(request: decode_pb2.CopyMigrationRequest, terms: Terms, layout: KvLayout) -> CopyAsked:
    """What a CopyMigration call for the migration of ``terms`` asks for, between instances of ``layout``."""
    if request.round < 1:
        raise bad_field("round", "counts from 1")
    return CopyAsked(request.round, _first_block(request.first_block), _ticket(request.ticket, terms, layout))


def commit_asked(request: decode_pb2.CommitMigrationRequest, terms: Terms, layout: KvLayout) -> CommitAsked:
    """What a CommitMigration call for the migration of ``terms`` asks for, between instances of ``layout``."""
    spec = convert.spec(request.sequence)
    check_sequence(spec)
    if (spec.request_id, spec.epoch) != (terms.request_id, terms.epoch):
        raise bad_field("sequence", f"is not {terms.request_id} of epoch {terms.epoch}, for which blocks are reserved")
    if len(spec.output_token_ids) >= spec.sampling.max_output_tokens:
        raise bad_field("sequence.output_token_ids", "leave nothing to generate")
    first_block = _first_block(request.first_block)
    ticket = _ticket(request.ticket, terms, layout)
    blocks = first_block + len(ticket.block_ids)
    if not (blocks - 1) * layout.block_tokens < ticket.resident_tokens <= blocks * layout.block_tokens:
        raise bad_field("ticket.resident_tokens", f"{ticket.resident_tokens} tokens do not end in block {blocks}")
    if ticket.resident_tokens >= spec.tokens:
        raise bad_field("ticket.resident_tokens", f"the KV of the last of {spec.tokens} tokens cannot be there yet")
    return CommitAsked(spec, first_block, ticket)


def _ticket(message: sequence_pb2.KvTicket, terms: Terms, layout: KvLayout) -> KvTicket:
    ticket = convert.ticket(message)
    if ticket.instance_id != terms.source_id:
        raise bad_field("ticket.instance_id", f"is not the source, {terms.source_id}")
    _check_address("ticket.address", ticket.address)
    _check_id("ticket.lease_id", ticket.lease_id)
    if ticket.layout != layout:
        raise bad_field("ticket.layout", "is not this instance's")
    if not ticket.block_ids:
        raise bad_field("ticket.block_ids", "is empty")
    if not ticket.lease_duration_s > 0:
        raise bad_field("ticket.lease_duration", "must be above 0")
    return ticket


def _first_block(value: int) -> int:
    if value < 0:
        raise bad_field("first_block", "must not be negative")
    return value


def _reason(value: decode_pb2.MigrationReason.ValueType) -> MigrationReason:
    reason = convert_migration.reason(value)
    if reason is None:
        raise bad_field("reason", "must say why")
    return reason


def _traceparent(value: str) -> str:
    if len(value) > MAX_TRACEPARENT_LENGTH:
        raise bad_field("traceparent", f"has at most {MAX_TRACEPARENT_LENGTH} characters")
    return value


def _check_id(field: str, value: str) -> None:
    try:
        check_ids(value)
    except ValueError as error:
        raise bad_field(field, str(error)) from None


def _check_epoch(field: str, value: int) -> None:
    try:
        check_epoch(value)
    except ValueError as error:
        raise bad_field(field, str(error)) from None


def _check_address(field: str, value: str) -> None:
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or len(value) > MAX_ADDRESS_LENGTH:
        raise bad_field(field, "is HOST:PORT")
