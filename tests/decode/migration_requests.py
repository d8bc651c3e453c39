"""The messages of a migration, right in all fields but those that a test changes."""

from __future__ import annotations

import dataclasses
from typing import Any

from starmesh.migration.terms import Terms
from starmesh.rpc import convert
from starmesh.types import KvLayout, KvTicket, MigrationReason, SequenceSpec
from starmesh.v1 import decode_pb2
from tests.instance.running import spec

TERMS = Terms(reservation_id="r", request_id="z", epoch=1, source_id="A", target_id="B", reason=MigrationReason.LOAD)


def migrate_request(**changes: Any) -> decode_pb2.MigrateRequest:
    fields: dict[str, Any] = {
        "request_id": "a",
        "epoch": 1,
        "target_instance_id": "B",
        "target_address": "127.0.0.1:1",
        "reason": decode_pb2.MIGRATION_REASON_OPERATOR,
    }
    return decode_pb2.MigrateRequest(**{**fields, **changes})


LAYOUT = KvLayout("checking", "float32", 1, 1, 1, 4)
TICKET = KvTicket("lease", "A", "127.0.0.1:1", LAYOUT, (5, 6), 8, 30.0)


def reserve_request(**changes: Any) -> decode_pb2.ReserveMigrationRequest:
    fields: dict[str, Any] = {
        "reservation_id": "r",
        "request_id": "z",
        "epoch": 1,
        "source_instance_id": "A",
        "source_address": "127.0.0.1:1",
        "layout": convert.layout_pb(LAYOUT),
        "blocks": 8,
        "reason": decode_pb2.MIGRATION_REASON_LOAD,
        "max_tokens": 30,
    }
    return decode_pb2.ReserveMigrationRequest(**{**fields, **changes})


def copy_request(ticket: KvTicket = TICKET, **changes: Any) -> decode_pb2.CopyMigrationRequest:
    fields: dict[str, Any] = {"reservation_id": "r", "round": 1, "first_block": 0, "ticket": convert.ticket_pb(ticket)}
    return decode_pb2.CopyMigrationRequest(**{**fields, **changes})


def commit_request(
    sequence: SequenceSpec | None = None, ticket: KvTicket = TICKET, **changes: Any
) -> decode_pb2.CommitMigrationRequest:
    sequence = sequence or spec("z", prompt=8, outputs=(1,))
    fields: dict[str, Any] = {
        "reservation_id": "r",
        "sequence": convert.spec_pb(sequence),
        "ticket": convert.ticket_pb(ticket),
    }
    return decode_pb2.CommitMigrationRequest(**{**fields, **changes})


def ticket(**changes: Any) -> KvTicket:
    return dataclasses.replace(TICKET, **changes)
