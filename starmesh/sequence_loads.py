"""The sequences of a load in columns: as a sequence of ``SequenceLoad`` for those that read, as one buffer for those
that compute.

Owns the order of the columns and that nothing changes. A round of rescheduling reads hundreds of thousands of
sequences; as objects, reading them takes longer than deciding. Rows are made when somebody asks for one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
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

_counts_of = attrgetter(*COUNTS)


class SequenceLoads(Sequence[SequenceLoad]):
    """Immutable; equal to a tuple of the same rows, and hashed like it.

    ``counts`` is [sequences, COUNTS] by row, 64-bit signed in the machine's order, UNKNOWN for None.
    """

    __slots__ = ("_rows", "counts", "request_ids")

    def __init__(self, request_ids: Iterable[str], columns: Iterable[Iterable[int]]) -> None:
        """One column for each of COUNTS. Raises ValueError for columns of different lengths and OverflowError for
        counts beyond 64 bits."""
        self.request_ids = tuple(request_ids)
        by_row = zip(*columns, strict=True)
        self.counts = array("q", chain.from_iterable(by_row)).tobytes()
        if len(self.counts) != len(self.request_ids) * len(COUNTS) * 8:
            raise ValueError(f"{len(self.request_ids)} sequences need as many of each of {len(COUNTS)} counts")
        self._rows: tuple[SequenceLoad, ...] | None = None

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
            return self.counts == other.counts and self.request_ids == other.request_ids
        return self._as_rows() == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._as_rows())

    def __repr__(self) -> str:
        return repr(self._as_rows())

    def _as_rows(self) -> tuple[SequenceLoad, ...]:
        # Made once: a router reads the same load again and again. Two threads would make the same.
        if self._rows is None:
            counts = (None if count == UNKNOWN else count for count in array("q", self.counts))
            self._rows = tuple(map(SequenceLoad, self.request_ids, *[counts] * len(COUNTS)))
        return self._rows
