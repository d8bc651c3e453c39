"""Admission: how much room a request needs, whether an instance has it, and who waits when none has.

Pure: ``Room`` answers from one instance's view; ``AdmissionQueue`` orders requests and counts time, which comes in as
data. Owns no choice between instances (``dispatch``), no reservation (the ledger) and no waiting (the router).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from starmesh.sequence_loads import SequenceLoads
from starmesh.types import InstanceView, Role


@dataclass(frozen=True, slots=True)
class AdmissionConfig:
    """How cautiously room is given away.

    ``headroom_tokens`` is the output that a request may add before anyone looks at its instance again; nobody knows how
    long its answer will be, and reserving all that it may generate would leave most of the memory unused. A longer
    answer grows into what is free. ``watermark`` is the part of an instance's blocks that is kept for such growth of
    the sequences already there: each request admitted below it would soon cost one of them a preemption.

    ``admit_all`` gives a decode instance all that would fit it if it were empty, and has it wait there, as a P/D set-up
    does whose proxy knows nothing of memory. For comparisons.
    """

    headroom_tokens: int = 256
    watermark: float = 0.02
    admit_all: bool = False

    def __post_init__(self) -> None:
        if self.headroom_tokens < 0 or not 0 <= self.watermark < 1:
            raise ValueError(f"headroom_tokens is at least 0 and watermark within 0 to 1, not {self}")


@dataclass(frozen=True, slots=True)
class Need:
    """What a request weighs: ``tokens`` that its prompt and output have so far, and how many it may still add."""

    tokens: int
    remaining_output_tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.remaining_output_tokens < 0:
            raise ValueError(f"a request has a token and no negative rest, not {self}")


@dataclass(frozen=True, slots=True)
class Room:
    """One instance's blocks against its reservations. An instance that has not reported yet counts as having room for
    one sequence of the longest kind: nothing else is known of it."""

    instance: InstanceView
    config: AdmissionConfig

    @property
    def limit_tokens(self) -> int:
        """Tokens that it holds in all; the most that may be reserved on it."""
        load, layout = self.instance.load, self.instance.info.layout
        if layout is None:
            return 0
        return self.instance.info.max_sequence_tokens if load is None else load.total_blocks * layout.block_tokens

    def fits(self, need: Need) -> bool:
        """Whether it could hold the request if it were empty."""
        longest = self.instance.info.max_sequence_tokens or self.limit_tokens
        return self._least_tokens(need) <= min(longest, self.limit_tokens)

    def reserve_tokens(self, need: Need) -> int:
        """Tokens to reserve for the request: whole blocks, and never more than the instance has.

        A prefill instance computes what the request has so far. A decode instance also stores the token that it is
        given and, as far as the request may go on, the headroom.
        """
        tokens = self._least_tokens(need)
        if self.instance.info.role is not Role.PREFILL:
            tokens += max(0, min(need.remaining_output_tokens - 1, self.config.headroom_tokens))
        return min(self._whole_blocks(tokens), max(self.limit_tokens, self._least_tokens(need)))

    def has_room(self, need: Need) -> bool:
        """Whether it holds ``reserve_tokens`` beside what is reserved and what its sequences still lack, and stays
        above the watermark; an idle instance need not. With ``admit_all`` a decode instance has room for all that
        fits."""
        if self.config.admit_all and self.instance.info.role is not Role.PREFILL:
            return self.fits(need)
        kept = 0 if self._idle else int(self.limit_tokens * self.config.watermark)
        return self.reserve_tokens(need) <= self.free_tokens - kept

    @property
    def free_tokens(self) -> int:
        """Tokens in blocks that neither a sequence nor a reservation has or waits for; negative when overcommitted."""
        load, layout = self.instance.load, self.instance.info.layout
        if load is None or layout is None:
            return self.limit_tokens - self.instance.reserved_tokens
        return load.free_blocks * layout.block_tokens - lacking_tokens(self.instance) - self.instance.reserved_tokens

    @property
    def _idle(self) -> bool:
        load = self.instance.load
        return not self.instance.reservations and (load is None or load.running_sequences + load.waiting_sequences == 0)

    def _least_tokens(self, need: Need) -> int:
        return need.tokens if self.instance.info.role is Role.PREFILL else need.tokens + 1

    def _whole_blocks(self, tokens: int) -> int:
        layout = self.instance.info.layout
        block_tokens = layout.block_tokens if layout else 1
        return -(-tokens // block_tokens) * block_tokens


def lacking_tokens(instance: InstanceView) -> int:
    """Tokens of the instance's own sequences whose KV is not resident yet: waiting, preempted, or partly computed."""
    if instance.load is None:
        return 0
    return SequenceLoads.of(instance.load.sequences).lacking_tokens


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits for room. Higher ``priority`` first; ``deadline_s`` is when it gives up."""

    request_id: str
    deadline_s: float
    priority: int = 0


@dataclass(slots=True)
class AdmissionQueue:
    """A bounded queue: by priority, then first come first served. Times are of one clock and never go back."""

    max_length: int
    # Sorted. Arrivals are unique, so that requests themselves are never compared.
    _entries: list[tuple[int, int, Waiting]] = field(default_factory=list)
    _by_id: dict[str, tuple[int, int, Waiting]] = field(default_factory=dict)
    _arrivals: int = 0
    _interval_s: float = 1.0
    _last_s: float = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Waiting]:
        """The requests in the order of their turn."""
        return (waiting for _, _, waiting in self._entries)

    def push(self, waiting: Waiting, now_s: float) -> bool:
        """Add a request behind those of its priority. Returns False, adding nothing, when the queue is full or the
        deadline is past. Raises ValueError for a request that waits already."""
        if waiting.request_id in self._by_id:
            raise ValueError(f"{waiting.request_id} waits already")
        if len(self._entries) >= self.max_length or waiting.deadline_s <= now_s:
            return False
        if not self._entries:
            # Time without anybody waiting says nothing of how fast room comes free.
            self._last_s = now_s
        entry = (-waiting.priority, self._arrivals, waiting)
        bisect.insort(self._entries, entry)
        self._by_id[waiting.request_id] = entry
        self._arrivals += 1
        return True

    def pop(self, now_s: float) -> Waiting | None:
        """Take the request whose turn it is; its wait informs ``retry_delay_s``."""
        if not self._entries:
            return None
        _, _, waiting = self._entries.pop(0)
        del self._by_id[waiting.request_id]
        # An exponential average over some ten departures: one long answer must not look like a standstill.
        self._interval_s += 0.1 * (now_s - self._last_s - self._interval_s)
        self._last_s = now_s
        return waiting

    def remove(self, request_id: str) -> bool:
        """Take out a request that was cancelled. Returns False if it does not wait."""
        entry = self._by_id.pop(request_id, None)
        if entry is None:
            return False
        del self._entries[bisect.bisect_left(self._entries, entry)]
        return True

    def expire(self, now_s: float) -> tuple[Waiting, ...]:
        """Take out those whose deadline is reached, in order."""
        expired = tuple(waiting for waiting in self if waiting.deadline_s <= now_s)
        for waiting in expired:
            self.remove(waiting.request_id)
        return expired

    @property
    def next_deadline_s(self) -> float | None:
        """When to call ``expire`` next; None when nobody waits."""
        return min((waiting.deadline_s for waiting in self), default=None)

    def retry_delay_s(self, now_s: float, *, least_s: float = 0.5, most_s: float = 30.0) -> float:
        """When a request that is refused now should come again: once those that wait have had their turn, at the rate
        seen lately (of the present standstill, where that is longer). For ``RetryInfo``."""
        standstill_s = now_s - self._last_s if self._entries else 0.0
        return min(max(len(self._entries) * max(self._interval_s, standstill_s), least_s), most_s)
