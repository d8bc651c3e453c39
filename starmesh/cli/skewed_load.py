"""A load that static placement cannot balance: every so many-th request is long, and round robin puts all of those on
one decode instance. Pure.

Lengths are fixed (no end-of-sequence token ends a request), so that every policy gets the very same work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from starmesh.cli.options import Asking
from starmesh.v1 import inference_pb2

_PROMPTS = (
    "Tell a story about a lighthouse keeper who finds a letter.",
    "Describe how bread is made, step by step.",
    "Explain how tides work to a curious child.",
    "Write about a train journey through the mountains.",
    "List things to check before a long bicycle tour, with reasons.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SkewedLoad:
    """``count`` requests; of each ``period`` the first generates ``long_tokens``, the others ``short_tokens``."""

    count: int
    period: int
    long_tokens: int
    short_tokens: int

    @property
    def output_tokens(self) -> int:
        """Tokens that all requests generate together."""
        long = -(-self.count // self.period)
        return long * self.long_tokens + (self.count - long) * self.short_tokens

    def requests(self, *, chat: bool) -> Iterator[inference_pb2.GenerateRequest]:
        """The requests in the order of their arrival, greedy."""
        for number, prompt in zip(range(self.count), itertools.cycle(_PROMPTS), strict=False):
            tokens = self.short_tokens if number % self.period else self.long_tokens
            asking = Asking(max_output_tokens=tokens, temperature=0.0, ignore_eos=True)
            yield asking.request(prompt, chat=chat)
