"""Every field of a migration's calls that is wrong is named."""

from __future__ import annotations

import dataclasses
from typing import Any

import grpc
import pytest

from services.decode import migration_intake as intake
from services.decode.outgoing import MoveAsked
from starmesh.migration.target_record import CommitAsked, CopyAsked
from starmesh.rpc.status import StatusError
from starmesh.types import MigrationReason
from starmesh.v1 import decode_pb2
from tests.decode.migration_requests import (
    LAYOUT,
    TERMS,
    TICKET,
    commit_request,
    copy_request,
    migrate_request,
    reserve_request,
    ticket,
)
from tests.instance.running import spec

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"request_id": ""}, "request_id"),
        ({"epoch": 0}, "epoch"),
        ({"target_instance_id": "x" * 129}, "target_instance_id"),
        ({"target_address": "nowhere"}, "target_address"),
        ({"target_address": "h" * 300 + ":1"}, "target_address"),
        ({"reason": 0}, "reason"),
        ({"reason": 99}, "reason"),
        ({"leader_term": -1}, "leader_term"),
        ({"traceparent": "x" * 129}, "traceparent"),
    ],
)
def test_migrate_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(StatusError) as caught:
        intake.move_asked(migrate_request(**changes))
    assert (caught.value.code, caught.value.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (reserve_request(reservation_id="x" * 129), "reservation_id"),
        (reserve_request(request_id=""), "request_id"),
        (reserve_request(epoch=0), "epoch"),
        (reserve_request(source_instance_id=""), "source_instance_id"),
        (reserve_request(source_instance_id="B"), "source_instance_id"),
        (reserve_request(blocks=0), "blocks"),
        (reserve_request(max_tokens=-1), "max_tokens"),
        (reserve_request(reason=0), "reason"),
        (reserve_request(traceparent="x" * 129), "traceparent"),
        (copy_request(round=0), "round"),
        (copy_request(first_block=-1), "first_block"),
        (copy_request(ticket(instance_id="C")), "ticket.instance_id"),
        (copy_request(ticket(address="")), "ticket.address"),
        (copy_request(ticket(lease_id="")), "ticket.lease_id"),
        (copy_request(ticket(layout=dataclasses.replace(LAYOUT, layers=2))), "ticket.layout"),
        (copy_request(ticket(block_ids=())), "ticket.block_ids"),
        (copy_request(ticket(lease_duration_s=0.0)), "ticket.lease_duration"),
        (commit_request(spec("y", prompt=8, outputs=(1,))), "sequence"),
        (commit_request(spec("z", epoch=2, prompt=8, outputs=(1,))), "sequence"),
        (commit_request(spec("z", prompt=0, outputs=(1,))), "sequence.prompt_token_ids"),
        (commit_request(spec("z", prompt=8, outputs=(1,), limit=1)), "sequence.output_token_ids"),
        (commit_request(first_block=-1), "first_block"),
        (commit_request(ticket=ticket(resident_tokens=4)), "ticket.resident_tokens"),
        (commit_request(ticket=ticket(resident_tokens=9)), "ticket.resident_tokens"),
        (commit_request(spec("z", prompt=7, outputs=(1,))), "ticket.resident_tokens"),
    ],
)
def test_a_target_names_the_field(request_: Any, field: str) -> None:
    with pytest.raises(StatusError) as caught:
        _taken(request_)
    assert (caught.value.code, caught.value.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


def _taken(request: Any) -> Any:
    match request:
        case decode_pb2.ReserveMigrationRequest():
            return intake.room_asked(request, target_id="B", parent="")
        case decode_pb2.CopyMigrationRequest():
            return intake.copy_asked(request, TERMS, LAYOUT)
        case _:
            return intake.commit_asked(request, TERMS, LAYOUT)


def test_what_is_right_is_taken_as_it_is() -> None:
    assert intake.move_asked(migrate_request(leader_term=3, traceparent="t")) == MoveAsked(
        request_id="a",
        target_id="B",
        address="127.0.0.1:1",
        reason=MigrationReason.OPERATOR,
        epoch=1,
        traceparent="t",
        leader_term=3,
    )
    room = intake.room_asked(reserve_request(), target_id="B", parent="x" * 129)
    assert (room.terms, room.layout, room.blocks, room.max_tokens, room.parent) == (TERMS, LAYOUT, 8, 30, "")
    assert intake.copy_asked(copy_request(), TERMS, LAYOUT) == CopyAsked(1, 0, TICKET)
    assert intake.commit_asked(commit_request(), TERMS, LAYOUT) == CommitAsked(
        spec("z", prompt=8, outputs=(1,)), 0, TICKET
    )
