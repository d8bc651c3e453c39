"""How ``starmesh migrate`` tells how far a move is."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration

from starmesh.cli.migrate import describe
from starmesh.v1 import cluster_pb2, decode_pb2

pytestmark = pytest.mark.fast


def progress(stage: decode_pb2.MigrationStage.ValueType, **fields: object) -> cluster_pb2.MigrateSequenceResponse:
    told = decode_pb2.MigrateResponse(stage=stage, target_instance_id="decode-1", **fields)  # type: ignore[arg-type]
    return cluster_pb2.MigrateSequenceResponse(source_instance_id="decode-0", progress=told)


@pytest.mark.parametrize("stage", decode_pb2.MigrationStage.values())
def test_every_stage_has_words(stage: decode_pb2.MigrationStage.ValueType) -> None:
    line = describe(progress(stage))
    assert line
    assert (line == "under way") == (stage == decode_pb2.MIGRATION_STAGE_UNSPECIFIED)


def test_the_end_says_what_it_cost() -> None:
    moved = progress(
        decode_pb2.MIGRATION_STAGE_MOVED,
        rounds=2,
        copied_blocks=31,
        transfer_bytes=22_000_000,
        frozen_duration=Duration(nanos=12_000_000),
    )
    assert describe(moved) == "moved to decode-1: 31 blocks (22.0 MB) in 2 rounds, standing still for 12 ms"


def test_staying_says_why() -> None:
    refused = progress(
        decode_pb2.MIGRATION_STAGE_STAYED,
        cause=decode_pb2.MIGRATION_CAUSE_REFUSED,
        refusal=decode_pb2.MIGRATION_REFUSAL_NO_ROOM,
    )
    assert describe(refused) == "goes on at decode-0: decode-1 does not take it (no room)"
    silent = progress(decode_pb2.MIGRATION_STAGE_STAYED, cause=decode_pb2.MIGRATION_CAUSE_TARGET_SILENT)
    assert describe(silent) == "goes on at decode-0: target silent"


def test_a_newer_routers_reasons_are_numbers() -> None:
    newer = progress(decode_pb2.MIGRATION_STAGE_STAYED, cause=99)
    assert describe(newer) == "goes on at decode-0: 99"
    refused = progress(decode_pb2.MIGRATION_STAGE_STAYED, cause=decode_pb2.MIGRATION_CAUSE_REFUSED, refusal=98)
    assert describe(refused) == "goes on at decode-0: decode-1 does not take it (98)"
