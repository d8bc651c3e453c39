"""Gaps that a client sees while its sequence moves round the ring, and while it is recomputed."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.migration.client import CONTEXT_TOKENS, Client
from benchmarks.migration.moves import Move, MoveFailed
from benchmarks.migration.processes import LIVE_PAIR, RING
from benchmarks.migration.spread import spread
from starmesh.types import TransferBackend

BACKENDS = [backend.value for backend in TransferBackend]
GROWTH = 1.25
"""A sequence that has grown by this is replaced by a new one of its length."""
ROOM = 96
"""Tokens that may come during one move; less room in the context than this calls for a new sequence too."""


@dataclass(frozen=True, slots=True)
class GapPlan:
    """Each of ``lengths``, in this order, begins a sequence that makes ``moves`` live moves by each backend: first
    ``rounds`` times round the ring, with as many stop-and-copies, then back and forth between the live instances. Then
    it is recomputed as often as ``recomputes`` says. ``settle_tokens`` before and after a move give its time between
    tokens."""

    lengths: tuple[int, ...]
    moves: int
    rounds: int
    recomputes: dict[int, int]
    settle_tokens: int = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """What a gap depends on. ``live`` moves copy while the sequence decodes, others freeze it first."""

    live: bool
    backend: str
    length: int


@dataclass(slots=True)
class Gaps:
    """Moves by kind, seconds of prefills by length, and what was said of moves that failed."""

    moves: dict[Kind, list[Move]] = field(default_factory=lambda: defaultdict(list))
    recomputes: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: list[str] = field(default_factory=list)

    def rate(self, backend: str, *, live: bool) -> list[float]:
        """MB a second of each move of the longest sequences: of its copy rounds, or of its time in no batch."""
        found = self.moves[Kind(live, backend, max(self.recomputes))]
        if live:
            return [move.copied_bytes / 1e6 / move.copy_s for move in found]
        return [move.tail_bytes / 1e6 / move.frozen_s for move in found]

    def by_length(self, value: Callable[[Move], float], *, live: bool) -> dict[str, dict[str, list[float]]]:
        """Spreads of ``value`` by backend and length."""
        return {
            backend: {
                str(length): spread([value(move) for move in self.moves[Kind(live, backend, length)]])
                for length in sorted(self.recomputes)
            }
            for backend in BACKENDS
        }

    def over_all(self, value: Callable[[Move], float]) -> dict[str, list[float]]:
        """Spreads of ``value`` over the moves of all kinds, by length."""
        return {
            str(length): spread(
                [value(move) for kind, found in self.moves.items() if kind.length == length for move in found]
            )
            for length in sorted(self.recomputes)
        }

    def describe(self) -> dict[str, Any]:
        """What the benchmark's result has of them."""
        return {
            "gap_ms": self.by_length(lambda move: 1e3 * move.gap_s, live=True),
            "stop_and_copy_ms": self.by_length(lambda move: 1e3 * move.gap_s, live=False),
            "recompute_ms": {
                str(length): spread([1e3 * seconds for seconds in self.recomputes[length]])
                for length in sorted(self.recomputes)
            },
            "itl_ms": self.over_all(lambda move: 1e3 * move.itl_s),
            "gap_over_itl_ms": self.by_length(lambda move: 1e3 * (move.gap_s - move.itl_s), live=True),
            "frozen_ms": self.by_length(lambda move: 1e3 * move.frozen_s, live=True),
            "copy_rounds_ms": self.by_length(lambda move: 1e3 * move.copy_s, live=True),
            "copy_rounds": self.by_length(lambda move: move.rounds, live=True),
            "resident_tokens": self.over_all(lambda move: move.resident_tokens),
            "failed_moves": self.failures,
        }


async def measure_gaps(client: Client, plan: GapPlan, note: Callable[[str], None]) -> Gaps:
    """One sequence after the other."""
    gaps = Gaps()
    for length in plan.lengths:
        stream = await client.start(RING[0], length)
        gaps.recomputes[length].append(stream.waited_s)
        paths = [RING] * plan.rounds + [LIVE_PAIR] * (plan.moves - plan.rounds)
        hops = (zip(path, (*path[1:], path[0]), strict=True) for path in paths)
        for source, target in itertools.chain.from_iterable(hops):
            try:
                move = await client.move(stream, target, settle_tokens=plan.settle_tokens)
                gaps.moves[Kind(source.live, target.backend.value, length)].append(move)
            except MoveFailed as failure:
                gaps.failures.append(str(failure))
                note(str(failure))
            if stream.member is not target or stream.tokens > min(GROWTH * length, CONTEXT_TOKENS - ROOM):
                client.cancel(stream)
                stream = await client.start(target, length)
                gaps.recomputes[length].append(stream.waited_s)
        for number in range(plan.recomputes.get(length, 0)):
            await client.recompute(stream, LIVE_PAIR[number % 2])
            gaps.recomputes[length].append(stream.waited_s)
        client.cancel(stream)
        for backend in BACKENDS:
            over_itl_s = [move.gap_s - move.itl_s for move in gaps.moves[Kind(True, backend, length)]]
            note(
                f"{length} tokens, {backend}: live gap {1e3 * statistics.median(over_itl_s):.1f} ms over a step's time"
            )
    return gaps
