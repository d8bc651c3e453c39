"""What every ledger accepts: bounds of ids, lifetimes and counts. Owns no storage; all raise ValueError."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from starmesh.rounds import MAX_MOVES, MAX_REASONS, MAX_ROUNDS, MAX_TEXT, RoundSummary
from starmesh.types import MAX_REQUEST_ID_LENGTH, InstanceInfo, InstanceLoad, Ownership

MAX_SEQUENCES = 4096
MAX_TRANSFER_BACKENDS = 16
MAX_TTL_S = 86_400.0
OWNER_TTL_S = 30.0
"""How long an ownership entry lives that nobody renews: its router's, and the one that a migration makes until the
router has heard of it. Longer than an instance that does not answer is waited for."""
# Lua numbers are doubles: larger integers would be rounded inside the store.
MAX_COUNT = 2**53 - 1

_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_LENGTH}}}")
# Without braces, so that it cannot end the hash tag of the keys early.
_CLUSTER = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_ids(*ids: str) -> None:
    """Demand request, instance or incarnation ids: 1 to 128 of [A-Za-z0-9._:-]."""
    for value in ids:
        if not _ID.fullmatch(value):
            raise ValueError(f"an id is 1 to {MAX_REQUEST_ID_LENGTH} of [A-Za-z0-9._:-], not {value[:160]!r}")


def check_cluster(name: str) -> None:
    """Demand a cluster name: 1 to 64 of [A-Za-z0-9._-]."""
    if not _CLUSTER.fullmatch(name):
        raise ValueError(f"a cluster name is 1 to 64 of [A-Za-z0-9._-], not {name[:80]!r}")


def check_ttl(ttl_s: float) -> int:
    """Demand a lifetime above 0 s and at most a day. Returns it in whole milliseconds, at least one."""
    if not 0 < ttl_s <= MAX_TTL_S:
        raise ValueError(f"a ttl is above 0 and at most {MAX_TTL_S:.0f} s, not {ttl_s}")
    return max(1, round(ttl_s * 1000))


def check_reservation(tokens: int, limit_tokens: int) -> None:
    """Demand at least one token and a limit that is not negative."""
    if not 1 <= tokens <= MAX_COUNT or not 0 <= limit_tokens <= MAX_COUNT:
        raise ValueError(f"cannot reserve {tokens} tokens with at most {limit_tokens}")


def check_epoch(epoch: int) -> None:
    """Demand an epoch: they count from 1."""
    if not 1 <= epoch <= MAX_COUNT:
        raise ValueError(f"an epoch counts from 1, not {epoch}")


def check_claim(expected: Ownership | None, epoch: int) -> None:
    """Demand an epoch above the expected one."""
    check_epoch(epoch)
    if expected is not None and epoch <= expected.epoch:
        raise ValueError(f"epoch {epoch} does not exceed the expected {expected.epoch}")


def check_info(info: InstanceInfo) -> None:
    """Demand a registration that every process can read back."""
    check_ids(info.instance_id, info.incarnation)
    _check_counts(info.max_sequence_tokens, info.max_sequences)
    if info.layout is not None:
        layout = info.layout
        _check_counts(layout.layers, layout.kv_heads, layout.head_dim, layout.block_tokens)
    if len(info.transfer_backends) > MAX_TRANSFER_BACKENDS:
        raise ValueError(f"an instance offers at most {MAX_TRANSFER_BACKENDS} transfer backends")


def check_load(load: InstanceLoad) -> None:
    """Demand a load that every process can read back: one that cannot would blind the cluster, not its reporter."""
    if len(load.sequences) > MAX_SEQUENCES:
        raise ValueError(f"a load lists at most {MAX_SEQUENCES} sequences, not {len(load.sequences)}")
    if not 0 <= load.free_blocks <= load.total_blocks:
        raise ValueError(f"{load.free_blocks} of {load.total_blocks} blocks cannot be free")
    if not 0 <= load.step_duration_s < math.inf:
        raise ValueError(f"a step cannot take {load.step_duration_s} s")
    _check_counts(load.total_blocks, load.running_sequences, load.waiting_sequences, load.resident_tokens)
    _check_counts(load.output_tokens, load.preemptions, load.transfer_bytes)
    _check_counts(load.incoming_migrations, load.outgoing_migrations, load.migrated_sequences)
    for item in load.sequences:
        check_ids(item.request_id)
        _check_counts(item.epoch, item.prompt_tokens, item.output_tokens, item.resident_tokens, item.max_output_tokens)
        predicted = (item.remaining_tokens, item.remaining_tokens_upper, item.prediction_age_tokens)
        _check_counts(*(count for count in predicted if count is not None))


def check_rounds(rounds: Sequence[RoundSummary]) -> None:
    """Demand rounds that every process can read back, within the bounds of ``starmesh.rounds``."""
    if len(rounds) > MAX_ROUNDS:
        raise ValueError(f"at most {MAX_ROUNDS} rounds are shown, not {len(rounds)}")
    for shown in rounds:
        reasons = (shown.skipped_instances, shown.skipped_sequences)
        if len(shown.moves) > MAX_MOVES or max(map(len, reasons)) > MAX_REASONS:
            raise ValueError(f"a round lists at most {MAX_MOVES} moves and {MAX_REASONS} reasons")
        texts = (shown.policy, *(move.words for move in shown.moves), *(text for known in reasons for text in known))
        if max(map(len, texts)) > MAX_TEXT:
            raise ValueError(f"a text of a round has at most {MAX_TEXT} characters")
        check_ids(shown.leader)
        _check_counts(shown.term, shown.rounds, shown.instances, shown.planned_moves)
        _check_counts(*(count for known in reasons for count in known.values()))
        numbers = [shown.first_s, shown.last_s, shown.spread_before_tokens, shown.spread_after_tokens]
        for move in shown.moves:
            migration = move.migration
            check_ids(migration.request_id, migration.source, migration.target)
            check_epoch(migration.epoch)
            numbers += [migration.gain_tokens, move.duration_s]
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError("times and tokens of a round are finite and not negative")


def _check_counts(*counts: int) -> None:
    for count in counts:
        if not 0 <= count <= MAX_COUNT:
            raise ValueError(f"{count} is not a count")
