"""The ledger's documents: every field there and back, and nothing else accepted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.ledger import InvalidDocument
from starmesh.ledger.codec import (
    MAX_DOCUMENT_BYTES,
    decode_info,
    decode_load,
    decode_ownership,
    decode_rounds,
    encode_info,
    encode_load,
    encode_ownership,
    encode_rounds,
)
from starmesh.ledger.limits import MAX_COUNT, check_info, check_load
from starmesh.rounds import MAX_ROUNDS, RoundMove, RoundSummary
from starmesh.types import (
    InstanceInfo,
    InstanceLoad,
    KvLayout,
    Migration,
    Ownership,
    SequenceLoad,
    TransferBackend,
)

from .conformance import LAYOUT, instance, load, round_summary

pytestmark = pytest.mark.fast


IDS = st.text("azAZ09._:-", min_size=1, max_size=128)


def every_field_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Draws each field by its type, so that a field that is added and not encoded fails here."""
    drawn: dict[Any, st.SearchStrategy[Any]] = {
        str: IDS,
        int: st.integers(0, MAX_COUNT - 1),
        int | None: st.none() | st.integers(0, MAX_COUNT),
        float: st.floats(0, 1e9),
        KvLayout | None: st.none() | st.deferred(lambda: every_field_of(KvLayout)),
        tuple[TransferBackend, ...]: st.lists(st.sampled_from(TransferBackend), max_size=3).map(tuple),
        tuple[RoundMove, ...]: st.lists(st.deferred(lambda: every_field_of(RoundMove)), max_size=3).map(tuple),
        Migration: st.deferred(lambda: every_field_of(Migration)).map(
            lambda drawn: replace(drawn, epoch=drawn.epoch + 1)
        ),
        Mapping[str, int]: st.dictionaries(IDS, st.integers(0, MAX_COUNT), max_size=3),
        Sequence[SequenceLoad]: st.lists(st.deferred(lambda: every_field_of(SequenceLoad)), max_size=3).map(tuple),
    }
    return st.builds(
        kind,
        **{name: drawn[hint] if hint in drawn else st.from_type(hint) for name, hint in get_type_hints(kind).items()},
    )


INFOS = every_field_of(InstanceInfo)
LOADS = every_field_of(InstanceLoad).map(
    lambda drawn: replace(drawn, free_blocks=min(drawn.free_blocks, drawn.total_blocks))
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(INFOS)
def test_registration_there_and_back(info: InstanceInfo) -> None:
    check_info(info)
    assert decode_info(encode_info(info).encode(), info.state.value.encode()) == info


@given(LOADS)
def test_load_there_and_back(sent: InstanceLoad) -> None:
    check_load(sent)
    assert decode_load(encode_load(sent).encode()) == sent


def with_one_bad_count(value: Any, bad: int) -> list[Any]:
    return [replace(value, **{field.name: bad}) for field in fields(value) if field.type == "int"]


@pytest.mark.parametrize("bad", [-1, MAX_COUNT + 1])
def test_what_could_not_be_read_back_is_not_written(bad: int) -> None:
    (sequence,) = load("a").sequences
    loads = with_one_bad_count(load(), bad)
    loads += [replace(load(), sequences=(item,)) for item in with_one_bad_count(sequence, bad)]
    loads += [replace(load(), step_duration_s=duration_s) for duration_s in (-1.0, math.nan, math.inf)]
    infos = with_one_bad_count(instance(), bad)
    infos += [replace(instance(), layout=item) for item in with_one_bad_count(LAYOUT, bad)]
    infos += [replace(instance(), transfer_backends=100 * instance().transfer_backends)]
    assert (len(loads), len(infos)) == (11 + 5 + 3, 2 + 4 + 1)
    for item in loads:
        with pytest.raises(ValueError):
            check_load(item)
    for item in infos:
        with pytest.raises(ValueError):
            check_info(item)


@given(st.integers(1, MAX_COUNT), IDS)
def test_ownership_there_and_back(epoch: int, instance_id: str) -> None:
    ownership = Ownership(instance_id, epoch)
    assert decode_ownership(encode_ownership(ownership).encode()) == ownership


@given(st.lists(every_field_of(RoundSummary), max_size=3))
def test_rounds_there_and_back(rounds: list[RoundSummary]) -> None:
    assert decode_rounds(encode_rounds(rounds).encode()) == tuple(rounds)


def test_rounds_of_another_shape_are_refused() -> None:
    written = json.loads(encode_rounds([round_summary("a")]))
    (shown,) = written["rounds"]
    out_of_bounds = [{"term": -1}, {"term": 2**60}, {"last_s": -1.0}, {"policy": "x" * 201}, {"leader": "two words"}]
    others: list[Any] = [[{**shown, **change}] for change in ({"extra": 1}, {"term": "1"}, *out_of_bounds)]
    for rounds in ([shown] * (MAX_ROUNDS + 1), *others, [[]], 7):
        with pytest.raises(InvalidDocument, match="rounds"):
            decode_rounds(json.dumps({**written, "rounds": rounds}).encode())


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_in_the_ledgers_terms(document: bytes) -> None:
    for decode in (decode_load, decode_rounds, lambda data: decode_info(data, b"ready")):
        with pytest.raises(InvalidDocument):
            decode(document)


@given(st.data())
def test_a_field_of_another_type_is_refused_or_valid(data: st.DataObject) -> None:
    written: dict[str, Any] = json.loads(encode_load(load("a")))
    name = data.draw(st.sampled_from(sorted(written)))
    written[name] = data.draw(JSON)
    try:
        decoded = decode_load(json.dumps(written).encode())
    except InvalidDocument as error:
        assert name in str(error) or "JSON" in str(error)
    else:
        assert json.loads(encode_load(decoded)) == written


@pytest.mark.parametrize("name", sorted(json.loads(encode_info(instance()))))
def test_a_missing_field_is_refused(name: str) -> None:
    written = json.loads(encode_info(instance()))
    del written[name]
    with pytest.raises(InvalidDocument, match=name):
        decode_info(json.dumps(written).encode(), b"ready")


def test_an_unknown_field_is_refused() -> None:
    written = json.loads(encode_info(instance()))
    for document in ({**written, "extra": 1}, {**written, "layout": {**written["layout"], "extra": 1}}):
        with pytest.raises(InvalidDocument, match="extra is unknown"):
            decode_info(json.dumps(document).encode(), b"ready")


@pytest.mark.parametrize("version", [0, 2, "1", True, None, 1.0])
def test_another_version_is_refused_with_what_to_do(version: object) -> None:
    written = {**json.loads(encode_load(load())), "version": version}
    with pytest.raises(InvalidDocument, match="one release"):
        decode_load(json.dumps(written).encode())


def test_a_document_has_a_bound() -> None:
    huge = InstanceInfo("a", "one", instance().role, "x" * MAX_DOCUMENT_BYTES)
    with pytest.raises(ValueError, match="at most"):
        encode_info(huge)
    with pytest.raises(InvalidDocument, match="longer"):
        decode_load(b" " * (MAX_DOCUMENT_BYTES + 1))
