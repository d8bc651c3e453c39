"""The sequences of a load in columns: for those that read a sequence of ``SequenceLoad``, for those that compute
buffers.

Owns the order of the columns and that nothing changes. A round of rescheduling reads hundreds of thousands of
sequences; as objects, reading them takes longer than deciding. Rows are made when somebody asks for one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import overload

from starmesh.types import SequenceLoad

COUNTS = (
    "epoch",
    "prompt_tokens",
    "output_tokens",
    "resident_tokens",
    "max_output_tokens",
    "remaining_tokens",
    "remaining_tokens_upper",
    "prediction_age_tokens",
)
"""The fields of SequenceLoad after its request id, in its order."""

UNKNOWN = -1
"""A count that is None."""

_TOKENS = ("prompt_tokens", "output_tokens", "resident_tokens")
_counts_of = attrgetter(*COUNTS)


class SequenceLoads(Sequence[SequenceLoad]):
    """Immutable; equal to a tuple of the same rows, and hashed like it.

    ``columns`` has one buffer for each of COUNTS: 64-bit signed in the machine's order, UNKNOWN for None.
    """

    __slots__ = ("_lacking_tokens", "_rows", "columns", "request_ids")

    def __init__(self, request_ids: Iterable[str], columns: Iterable[Iterable[int]]) -> None:
        """Raises ValueError for columns of another number or length, and OverflowError for counts beyond 64 bits."""
        self.request_ids = tuple(request_ids)
        self.columns = tuple([array("q", column).tobytes() for column in columns])
        if list(map(len, self.columns)) != [8 * len(self.request_ids)] * len(COUNTS):
            raise ValueError(f"{len(self.request_ids)} sequences need as many of each of {len(COUNTS)} counts")
        self._rows: tuple[SequenceLoad, ...] | None = None
        self._lacking_tokens: int | None = None

    @classmethod
    def of_buffers(cls, request_ids: tuple[str, ...], columns: Iterable[bytes]) -> SequenceLoads:
        """The same from what ``columns`` are in the end: for those that compute them. Raises ValueError."""
        found = cls.__new__(cls)
        found.request_ids = request_ids
        found.columns = tuple(columns)
        if list(map(len, found.columns)) != [8 * len(request_ids)] * len(COUNTS):
            raise ValueError(f"{len(request_ids)} sequences need as many of each of {len(COUNTS)} counts")
        found._rows = found._lacking_tokens = None
        return found

    @classmethod
    def of(cls, rows: Sequence[SequenceLoad]) -> SequenceLoads:
        """The same rows in columns; ``rows`` itself if they already are."""
        if isinstance(rows, SequenceLoads):
            return rows
        columns = zip(*map(_counts_of, rows), strict=True) if rows else [()] * len(COUNTS)
        known = ([UNKNOWN if count is None else count for count in column] for column in columns)
        found = cls((row.request_id for row in rows), known)
        found._rows = tuple(rows)
        return found

    @property
    def lacking_tokens(self) -> int:
        """Tokens of all sequences whose KV is not resident yet."""
        # Counted once: a router asks at each dispatch.
        if self._lacking_tokens is None:
            prompt, output, resident = (array("q", self.columns[COUNTS.index(name)]) for name in _TOKENS)
            counts = zip(prompt, output, resident, strict=True)
            self._lacking_tokens = sum(max(0, p + o - r) for p, o, r in counts)
        return self._lacking_tokens

    def __len__(self) -> int:
        return len(self.request_ids)

    @overload
    def __getitem__(self, index: int) -> SequenceLoad: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[SequenceLoad, ...]: ...

    def __getitem__(self, index: int | slice) -> SequenceLoad | tuple[SequenceLoad, ...]:
        return self._as_rows()[index]

    def __iter__(self) -> Iterator[SequenceLoad]:
        return iter(self._as_rows())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SequenceLoads):
            return self.columns == other.columns and self.request_ids == other.request_ids
        return self._as_rows() == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._as_rows())

    def __repr__(self) -> str:
        return repr(self._as_rows())

    def _as_rows(self) -> tuple[SequenceLoad, ...]:
        # Made once: a router reads the same load again and again. Two threads would make the same.
        if self._rows is None:
            counts = ([None if n == UNKNOWN else n for n in array("q", column)] for column in self.columns)
            self._rows = tuple(map(SequenceLoad, self.request_ids, *counts))
        return self._rows
