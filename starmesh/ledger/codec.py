"""The documents of the ledger's store: versioned JSON with a strict schema.

Owns how registrations, loads, reservations, ownerships and shown rounds are written and read. A document of another
version, with a field missing, unknown or of the wrong type, raises InvalidDocument: during an upgrade an old process
must not act on half of what a new one said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

from starmesh.ledger import InvalidDocument
from starmesh.ledger.limits import MAX_COUNT, MAX_SEQUENCES, MAX_TRANSFER_BACKENDS, check_rounds
from starmesh.policy.rescheduling.plain import from_plain, to_plain
from starmesh.rounds import MAX_ROUNDS, RoundSummary
from starmesh.sequence_loads import UNKNOWN, SequenceLoads
from starmesh.types import (
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    KvLayout,
    Ownership,
    Role,
    TransferBackend,
)

VERSION = 1
MAX_DOCUMENT_BYTES = 1 << 20

_SEQUENCE_COLUMNS = 9
_PREDICTED_COLUMNS = 3  # the last ones; null without a prediction

# A router looks more often than an instance reports: most of what it reads it has read before.
CACHED_DOCUMENTS = 512

E = TypeVar("E", bound=Enum)


def encode_info(info: InstanceInfo) -> str:
    """Write a registration. The state is left out: it changes alone, so the store keeps it beside the document."""
    layout = info.layout
    return _dump(
        {
            "version": VERSION,
            "instance_id": info.instance_id,
            "incarnation": info.incarnation,
            "role": info.role.value,
            "address": info.address,
            "layout": None
            if layout is None
            else {
                "model_revision": layout.model_revision,
                "dtype": layout.dtype,
                "layers": layout.layers,
                "kv_heads": layout.kv_heads,
                "head_dim": layout.head_dim,
                "block_tokens": layout.block_tokens,
            },
            "transfer_backends": [backend.value for backend in info.transfer_backends],
            "max_sequence_tokens": info.max_sequence_tokens,
            "max_sequences": info.max_sequences,
        }
    )


@lru_cache(maxsize=CACHED_DOCUMENTS)
def decode_info(document: bytes, state: bytes) -> InstanceInfo:
    """Read a registration and the state kept beside it. Raises InvalidDocument."""
    fields = _Fields(_load(document), "registration")
    info = InstanceInfo(
        instance_id=fields.text("instance_id"),
        incarnation=fields.text("incarnation"),
        role=fields.member(Role, "role"),
        address=fields.text("address"),
        state=_member(InstanceState, state.decode(errors="replace"), "registration: state"),
        layout=None if fields.is_null("layout") else _layout(fields.child("layout")),
        transfer_backends=tuple(
            _member(TransferBackend, value, "registration: transfer_backends")
            for value in fields.array("transfer_backends", limit=MAX_TRANSFER_BACKENDS)
        ),
        max_sequence_tokens=fields.count("max_sequence_tokens"),
        max_sequences=fields.count("max_sequences"),
    )
    fields.end()
    return info


def encode_load(load: InstanceLoad) -> str:
    """Write a load. Sequences are rows without names: they are most of the bytes."""
    return _dump(
        {
            "version": VERSION,
            "total_blocks": load.total_blocks,
            "free_blocks": load.free_blocks,
            "running_sequences": load.running_sequences,
            "waiting_sequences": load.waiting_sequences,
            "resident_tokens": load.resident_tokens,
            "step_duration_s": load.step_duration_s,
            "output_tokens": load.output_tokens,
            "preemptions": load.preemptions,
            "transfer_bytes": load.transfer_bytes,
            "transfer_backend": None if load.transfer_backend is None else load.transfer_backend.value,
            "incoming_migrations": load.incoming_migrations,
            "outgoing_migrations": load.outgoing_migrations,
            "migrated_sequences": load.migrated_sequences,
            "sequences": [
                [
                    sequence.request_id,
                    sequence.epoch,
                    sequence.prompt_tokens,
                    sequence.output_tokens,
                    sequence.resident_tokens,
                    sequence.max_output_tokens,
                    sequence.remaining_tokens,
                    sequence.remaining_tokens_upper,
                    sequence.prediction_age_tokens,
                ]
                for sequence in load.sequences
            ],
        }
    )


@lru_cache(maxsize=CACHED_DOCUMENTS)
def decode_load(document: bytes) -> InstanceLoad:
    """Read a load. Raises InvalidDocument."""
    fields = _Fields(_load(document), "load")
    load = InstanceLoad(
        total_blocks=fields.count("total_blocks"),
        free_blocks=fields.count("free_blocks"),
        running_sequences=fields.count("running_sequences"),
        waiting_sequences=fields.count("waiting_sequences"),
        resident_tokens=fields.count("resident_tokens"),
        step_duration_s=fields.seconds("step_duration_s"),
        output_tokens=fields.count("output_tokens"),
        preemptions=fields.count("preemptions"),
        transfer_bytes=fields.count("transfer_bytes"),
        transfer_backend=None
        if fields.is_null("transfer_backend")
        else fields.member(TransferBackend, "transfer_backend"),
        incoming_migrations=fields.count("incoming_migrations"),
        outgoing_migrations=fields.count("outgoing_migrations"),
        migrated_sequences=fields.count("migrated_sequences"),
        sequences=_sequences(fields.array("sequences", limit=MAX_SEQUENCES)),
    )
    fields.end()
    return load


def encode_ownership(ownership: Ownership) -> str:
    """Write an ownership as "epoch instance_id": one spelling each, so that the store compares them as strings."""
    return f"{ownership.epoch} {ownership.instance_id}"


def decode_ownership(document: bytes) -> Ownership:
    """Read an ownership. Raises InvalidDocument."""
    epoch, _, instance_id = document.decode(errors="replace").partition(" ")
    if not instance_id:
        _refuse("ownership: not an epoch and an instance id")
    return Ownership(instance_id=instance_id, epoch=decode_count(epoch, "ownership: epoch"))


def encode_rounds(rounds: Sequence[RoundSummary]) -> str:
    """Write rounds that are shown."""
    return _dump({"version": VERSION, "rounds": to_plain(tuple(rounds))})


def decode_rounds(document: bytes) -> tuple[RoundSummary, ...]:
    """Read rounds that are shown. Raises InvalidDocument."""
    fields = _Fields(_load(document), "rounds")
    rows = fields.array("rounds", limit=MAX_ROUNDS)
    fields.end()
    try:
        rounds = tuple(from_plain(RoundSummary, row, f"rounds[{place}]") for place, row in enumerate(rows))
        # As much is demanded of who writes them. Beyond it no message that shows them could be made.
        check_rounds(rounds)
    except ValueError as error:  # NotPlain too
        _refuse(f"rounds: {error}")
    return rounds


def decode_count(text: str | bytes, what: str) -> int:
    """Read a count written in decimal digits. Raises InvalidDocument that names ``what``."""
    if len(text) > 16 or not text.isdigit() or not text.isascii():
        _refuse(f"{what} is not a count")
    return int(text)


def _layout(fields: _Fields) -> KvLayout:
    layout = KvLayout(
        model_revision=fields.text("model_revision"),
        dtype=fields.text("dtype"),
        layers=fields.count("layers"),
        kv_heads=fields.count("kv_heads"),
        head_dim=fields.count("head_dim"),
        block_tokens=fields.count("block_tokens"),
    )
    fields.end()
    return layout


def _sequences(rows: Collection[object]) -> SequenceLoads:
    """Check and keep by column: most of a ledger's documents are these rows."""
    whole = [row for row in rows if isinstance(row, list) and len(row) == _SEQUENCE_COLUMNS]
    request_ids, *counts = zip(*whole, strict=True) if whole else [()] * _SEQUENCE_COLUMNS
    certain, predicted = counts[:-_PREDICTED_COLUMNS], counts[-_PREDICTED_COLUMNS:]
    known = [[count for count in column if count is not None] for column in predicted]
    if (
        len(whole) != len(rows)
        or not set(map(type, request_ids)) <= {str}
        or not all(map(_are_counts, (*certain, *known)))
    ):
        _refuse("load: sequences holds something other than a request id, five counts and three that may be null")
    filled = [[UNKNOWN if count is None else count for count in column] for column in predicted]
    return SequenceLoads(request_ids, (*certain, *filled))


class _Fields:
    """Reads each field of a JSON object once, by name and type; ``end`` refuses what was not read."""

    def __init__(self, fields: dict[str, object], where: str) -> None:
        self._fields = dict(fields)
        self._where = where

    def text(self, name: str) -> str:
        value = self._take(name)
        return value if isinstance(value, str) else self._refuse(name, "is not a string")

    def count(self, name: str) -> int:
        value = self._take(name)
        return value if isinstance(value, int) and _is_count(value) else self._refuse(name, "is not a count")

    def seconds(self, name: str) -> float:
        value = self._take(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
            return float(value)
        return self._refuse(name, "is not a duration in seconds")

    def member(self, kind: type[E], name: str) -> E:
        return _member(kind, self._take(name), f"{self._where}: {name}")

    def array(self, name: str, *, limit: int) -> Collection[object]:
        value = self._take(name)
        if isinstance(value, list) and len(value) <= limit:
            return value
        return self._refuse(name, f"is not an array of at most {limit}")

    def is_null(self, name: str) -> bool:
        if self._fields.get(name, ...) is not None:
            return False
        del self._fields[name]
        return True

    def child(self, name: str) -> _Fields:
        value = self._take(name)
        return (
            _Fields(value, f"{self._where}: {name}") if isinstance(value, dict) else self._refuse(name, "is no object")
        )

    def end(self) -> None:
        for name in self._fields:
            self._refuse(name[:40], "is unknown")

    def _take(self, name: str) -> object:
        if name not in self._fields:
            self._refuse(name, "is missing")
        return self._fields.pop(name)

    def _refuse(self, name: str, why: str) -> NoReturn:
        _refuse(f"{self._where}: {name} {why}")


def _member(kind: type[E], value: object, what: str) -> E:
    try:
        return kind(value)
    except ValueError:
        _refuse(f"{what} has an unknown value")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _are_counts(values: Collection[Any]) -> bool:
    return not values or (set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= MAX_COUNT)


def _dump(fields: dict[str, object]) -> str:
    document = json.dumps(fields, separators=(",", ":"), allow_nan=False)
    if len(document) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"a ledger document has at most {MAX_DOCUMENT_BYTES} bytes, not {len(document)}")
    return document


def _load(document: bytes) -> dict[str, object]:
    """Parse an object of our version; drops ``version``."""
    if len(document) > MAX_DOCUMENT_BYTES:
        _refuse(f"longer than {MAX_DOCUMENT_BYTES} bytes")
    try:
        fields = json.loads(document, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        _refuse("not JSON")
    if not isinstance(fields, dict):
        _refuse("not a JSON object")
    version = fields.pop("version", None)
    if version != VERSION or type(version) is not int:
        _refuse(
            f"version {str(version)[:20]} where this process knows {VERSION}: run one release of starmesh in a cluster"
        )
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _refuse(why: str) -> NoReturn:
    raise InvalidDocument(why)
