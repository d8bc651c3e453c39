"""What every ledger accepts: bounds of ids, lifetimes and counts. Owns no storage; all raise ValueError."""

from __future__ import annotations

import re

from starmesh.types import MAX_REQUEST_ID_LENGTH, InstanceLoad, Ownership

MAX_INSTANCES = 256
MAX_SEQUENCES = 4096
MAX_TTL_S = 86_400.0
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


def check_load(load: InstanceLoad) -> None:
    """Demand a load that a document can hold."""
    if len(load.sequences) > MAX_SEQUENCES:
        raise ValueError(f"a load lists at most {MAX_SEQUENCES} sequences, not {len(load.sequences)}")
    if not 0 <= load.free_blocks <= load.total_blocks <= MAX_COUNT:
        raise ValueError(f"{load.free_blocks} of {load.total_blocks} blocks cannot be free")
