"""A sequence's tokens as their number: the simulator knows how many there are, never which.

Owns nothing but the count. A hundred million resident tokens are a few thousand of these.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Any, NoReturn, cast, overload

from starmesh.engine.emulated import FILLER_TOKEN_ID
from starmesh.types import SamplingParams, SequenceSpec


class TokenCount(MutableSequence[int]):
    """As a list of ``length`` equal tokens that can only grow at its end.

    It also stands where a ``SequenceSpec`` has tuples: those who pass a spec on only count, join and slice.
    """

    __slots__ = ("length",)

    def __init__(self, length: int = 0) -> None:
        self.length = length

    def __repr__(self) -> str:
        return f"TokenCount({self.length})"

    def __len__(self) -> int:
        return self.length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenCount) and self.length == other.length

    def __hash__(self) -> int:
        return hash(self.length)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> TokenCount: ...

    def __getitem__(self, index: int | slice) -> int | TokenCount:
        if isinstance(index, slice):
            return TokenCount(len(range(*index.indices(self.length))))
        if not -self.length <= index < self.length:
            raise IndexError(f"{index} is not among {self.length} tokens")
        return FILLER_TOKEN_ID

    def __add__(self, other: TokenCount) -> TokenCount:
        return TokenCount(self.length + other.length)

    def append(self, value: int) -> None:
        self.length += 1

    def insert(self, index: int, value: int) -> NoReturn:
        raise TypeError("a count of tokens grows at its end only")

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TypeError("a count of tokens has none to change")

    def __delitem__(self, index: Any) -> NoReturn:
        raise TypeError("a count of tokens has none to delete")


def counted_spec(
    request_id: str, epoch: int, *, prompt_tokens: int, output_tokens: int, sampling: SamplingParams, priority: int = 0
) -> SequenceSpec:
    """The spec of a sequence of which only the numbers of tokens are known."""
    # Live specs have tuples, which keep them from being changed. Nobody changes a spec's tokens here either.
    return SequenceSpec(
        request_id=request_id,
        epoch=epoch,
        prompt_token_ids=cast("tuple[int, ...]", TokenCount(prompt_tokens)),
        output_token_ids=cast("tuple[int, ...]", TokenCount(output_tokens)),
        sampling=sampling,
        priority=priority,
    )
