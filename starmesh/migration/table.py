"""What a transition table is: a key is a state and a kind of event, and a key that is absent is a protocol error.

Owns the look-up. The rows are each end's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TypeAlias, TypeVar

S = TypeVar("S", bound=Enum)
K = TypeVar("K", bound=Enum)
E = TypeVar("E")

Row: TypeAlias = tuple[S, tuple[type[E], ...]]
Table: TypeAlias = Mapping[tuple[S, K], Row[S, E]]


class ProtocolError(Exception):
    """An event that the state does not allow; nothing has changed. From a peer it is the peer's mistake: refuse its
    call. From this process it is a bug."""


def look_up(table: Table[S, K, E], state: S, kind: K) -> Row[S, E]:
    """The next state and the effects' types. Raises ProtocolError."""
    try:
        return table[state, kind]
    except KeyError:
        raise ProtocolError(f"{kind.name} does not belong in {state.name}") from None


def rows(states: Iterable[S], kind: K, row: Row[S, E]) -> dict[tuple[S, K], Row[S, E]]:
    """The same row for several states."""
    return {(state, kind): row for state in states}


def loops(states: Iterable[S], kinds: Iterable[K], effects: tuple[type[E], ...] = ()) -> dict[tuple[S, K], Row[S, E]]:
    """Rows for what may arrive in several states and leads out of none of them."""
    kinds = tuple(kinds)
    return {(state, kind): (state, effects) for state in states for kind in kinds}
