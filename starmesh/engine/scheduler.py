"""Who computes how many tokens in the next step, and who holds which blocks.

Owns every sequence of an instance, the waiting queue, the batch, reservations for incoming sequences, and preemption.
Samples nothing and runs nothing: the engine executes a ``Schedule`` and then tells how far each sequence got. Pure:
time comes in as data, and the same calls make the same schedules.

Why it always makes progress: a waiting sequence is admitted only with the blocks of all its tokens, so that a prompt
never runs dry between its chunks; a decoding sequence that needs a block takes it from those that are preempted before
it, and last of all is the one of highest rank, so that one runs in every step until it ends (blocks held for pullers or
for incoming sequences excepted: leases end those); one that was preempted is held back no longer than anyone of higher
rank runs; and no sequence outgrows the pool on its own (``limit_tokens``).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from starmesh.engine.block_pool import BlockPool, block_digest
from starmesh.engine.expected_ends import ExpectedEnds
from starmesh.engine.sequence import MakeSequence, Sequence, SequenceStatus
from starmesh.types import SequenceSpec


class SchedulingError(Exception):
    """A call that the scheduler refuses; nothing has changed."""


class CapacityError(SchedulingError):
    """The sequence can never fit this instance."""


class QueueFull(SchedulingError):
    """As many sequences wait as may; try another instance or later."""


class DuplicateRequest(SchedulingError):
    """The request is here already, under the same or a newer epoch."""


class UnknownRequest(SchedulingError):
    """No such request is here, or not in the status that the call needs."""


@dataclass(frozen=True, slots=True)
class IncomingSequence:
    """Blocks reserved for a sequence whose KV is on its way."""

    request_id: str
    epoch: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``tokens`` tokens of a sequence."""

    sequence: Sequence
    tokens: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step: what to compute, and who was preempted to make room for it."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Sequence, ...]


class Scheduler:
    """Schedules over ``pool``.

    ``max_step_tokens`` bounds a step's tokens and must be at least ``max_sequences``, which bounds the batch, so that
    every decoding sequence is in every step. ``max_waiting_sequences`` bounds the queue of added sequences; preempted
    ones always return to it. ``max_sequence_tokens`` is the context length. ``watermark`` is the part of the pool that
    admission leaves free while others run, so that they don't preempt the newcomer at once (1 % as in vLLM).
    ``make_sequence`` makes what it keeps of a sequence.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_step_tokens: int,
        max_sequences: int,
        max_waiting_sequences: int,
        max_sequence_tokens: int,
        prefix_caching: bool = False,
        watermark: float = 0.01,
        make_sequence: MakeSequence = Sequence.from_spec,
    ) -> None:
        if not 1 <= max_sequences <= max_step_tokens:
            raise ValueError(
                f"max_sequences must be from 1 to max_step_tokens ({max_step_tokens}), not {max_sequences}"
            )
        if not 0.0 <= watermark < 1.0:
            raise ValueError(f"watermark must be from 0 to below 1, not {watermark}")
        self.pool = pool
        self.max_sequence_tokens = max_sequence_tokens
        self.sequences: dict[str, Sequence] = {}
        self.incoming: dict[str, IncomingSequence] = {}
        self.running: list[Sequence] = []  # by rank
        self.waiting: list[Sequence] = []  # by turn
        self.preemptions = 0
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._max_waiting_sequences = max_waiting_sequences
        self._prefix_caching = prefix_caching
        self._watermark_blocks = int(watermark * pool.total_blocks)
        self._make_sequence = make_sequence
        self._arrivals = 0
        self._expected = ExpectedEnds({})
        self._held_back: Sequence | None = None  # waits until a sequence leaves, or more is known

    def limit_tokens(self, *, hold: bool) -> int:
        """Tokens at which a sequence ends here: the context length, or what the whole pool holds if that is less.

        The last token needs no KV, hence one more than the pool's. A sequence that is only prefilled here (``hold``)
        goes on elsewhere, so this pool does not end it.
        """
        if hold:
            return self.max_sequence_tokens
        return min(self.max_sequence_tokens, self._pool_tokens + 1)

    def add(self, spec: SequenceSpec, *, hold: bool, now_s: float) -> None:
        """Queue a sequence to be computed from its tokens; an older epoch of it here is removed.

        Raises CapacityError, QueueFull or DuplicateRequest, and ValueError for a sequence with nothing to generate.
        """
        self._check_fits(spec, hold=hold)
        self._check_newer(spec.request_id, spec.epoch)
        if len(self.waiting) >= self._max_waiting_sequences:
            raise QueueFull(f"{len(self.waiting)} sequences wait already; try another instance or later")
        self.remove(spec.request_id)
        insort(self.waiting, self._new_sequence(spec, hold=hold, now_s=now_s), key=attrgetter("turn"))

    def reserve(self, request_id: str, epoch: int, tokens: int) -> tuple[int, ...] | None:
        """Take blocks for an incoming sequence of ``tokens`` tokens, and a place in the batch.

        None when there is no room beside all that runs and waits: nobody is preempted for it, and it overtakes
        nobody. An older epoch of the request is removed either way. Raises CapacityError or DuplicateRequest.
        """
        blocks = self.pool.blocks_for(tokens)
        if tokens > self._pool_tokens or tokens > self.max_sequence_tokens:
            raise CapacityError(f"{tokens} tokens never fit this instance ({self._pool_tokens} at most)")
        self._check_newer(request_id, epoch)
        self.remove(request_id)
        places = len(self.running) + len(self.waiting) + len(self.incoming)
        spoken_for = sum(self.pool.blocks_for(sequence.tokens) for sequence in self.waiting)
        if places >= self._max_sequences or blocks + spoken_for + self._kept_free > self.pool.free_blocks:
            return None
        incoming = IncomingSequence(request_id, epoch, tuple(self.pool.allocate(blocks)))
        self.incoming[request_id] = incoming
        return incoming.block_ids

    def start(self, spec: SequenceSpec, resident_tokens: int, *, now_s: float) -> None:
        """Put a sequence whose KV of the first ``resident_tokens`` tokens is in its reserved blocks into the batch.

        Raises UnknownRequest without a reservation under this very epoch, CapacityError, and ValueError when the
        tokens and the blocks don't go together.
        """
        incoming = self.incoming.get(spec.request_id)
        if incoming is None or incoming.epoch != spec.epoch:
            raise UnknownRequest(f"{spec.request_id} has no blocks reserved under epoch {spec.epoch}; reserve first")
        self._check_fits(spec, hold=False)
        held_tokens = len(incoming.block_ids) * self.pool.block_tokens
        if not 0 <= resident_tokens <= min(spec.tokens - 1, held_tokens):
            raise ValueError(
                f"{spec.request_id}: {resident_tokens} resident tokens don't go with {spec.tokens} tokens, "
                f"{held_tokens} reserved"
            )
        del self.incoming[spec.request_id]
        sequence = self._new_sequence(spec, hold=False, now_s=now_s)
        sequence.block_ids = list(incoming.block_ids)
        sequence.computed_tokens = resident_tokens
        self._run(sequence)

    def expect(self, expected_tokens: Mapping[str, int]) -> None:
        """Go by this from now on: at how many tokens, prompt and output, requests are expected to end. Of one that is
        missing nothing is known. Who is preempted first and when it comes back depend on it, nothing else. The mapping
        is kept, not copied."""
        self._expected = ExpectedEnds(expected_tokens)
        self._held_back = None

    def preempted_first(self) -> list[Sequence]:
        """The running sequences in the order in which they would be preempted."""
        return self._expected.preempted_first(self.running)

    def schedule(self) -> Schedule:
        """Choose the next step: every decoding sequence, then prompts in progress, then waiting sequences."""
        budget = self._max_step_tokens
        chunks: dict[Sequence, int] = {}
        preempted: list[Sequence] = []
        # Sorting is stable: by rank among those that decode, and among those in their prompt.
        for sequence in sorted(self.running, key=lambda running: running.uncomputed_tokens > 1):
            tokens = min(sequence.uncomputed_tokens, budget)
            if tokens == 0 or sequence in preempted:
                continue
            blocks = self.pool.blocks_for(sequence.computed_tokens + tokens) - len(sequence.block_ids)
            victims = self._make_room(blocks, wanted_by=sequence)
            preempted += victims
            budget += sum(chunks.pop(victim, 0) for victim in victims)
            if sequence in victims:
                continue
            sequence.block_ids += self.pool.allocate(max(0, blocks))
            chunks[sequence] = tokens
            budget -= tokens
        # Blocks are short when someone was preempted: to admit another now would only move the shortage.
        while self.waiting and budget > 0 and not preempted:
            if len(self.running) + len(self.incoming) >= self._max_sequences or not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.pop(0)
            self._run(sequence)
            chunks[sequence] = min(sequence.uncomputed_tokens, budget)
            budget -= chunks[sequence]
        return Schedule(
            chunks=tuple(Chunk(sequence, tokens) for sequence, tokens in chunks.items()), preempted=tuple(preempted)
        )

    @property
    def all_decode(self) -> bool:
        """Whether there is a batch, and each sequence in it has one token to compute and goes on here after it."""
        if not 1 <= len(self.running) <= self._max_step_tokens:
            return False
        for sequence in self.running:  # noqa: SIM110  a simulator asks often, and a generator takes twice as long
            if sequence.hold or sequence.uncomputed_tokens != 1:
                return False
        return True

    @property
    def admits_nobody(self) -> bool:
        """Whether no step admits a waiting sequence until one of those that run ends or something is asked of the
        engine: meanwhile nothing frees blocks. (With prefix caching nobody knows: it may find blocks there.)"""
        if not self.waiting or len(self.running) + len(self.incoming) >= self._max_sequences:
            return True
        if self._prefix_caching:
            return False
        blocks = self.pool.blocks_for(self.waiting[0].tokens)
        return blocks + self._kept_free > self.pool.free_blocks or not self._may_come_back(self.waiting[0])

    def advance(self, sequence: Sequence, tokens: int) -> None:
        """Note that the KV of the next ``tokens`` tokens is computed."""
        sequence.computed_tokens += tokens
        if not self._prefix_caching:
            return
        full_blocks = sequence.computed_tokens // self.pool.block_tokens
        for index in range(sequence.published_blocks, full_blocks):
            self.pool.publish(sequence.block_ids[index], self._digests(sequence, full_blocks)[index])
        sequence.published_blocks = max(sequence.published_blocks, full_blocks)

    def hold(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch and keep its blocks."""
        self._leave(sequence)
        sequence.status = SequenceStatus.HELD

    def resume(self, request_id: str, epoch: int | None = None) -> None:
        """Put a held sequence back into the batch, be it full or not, and under ``epoch`` if one is given.

        Raises UnknownRequest or CapacityError, and ValueError for an epoch older than its own.
        """
        sequence = self.find(request_id, SequenceStatus.HELD)
        if epoch is not None and epoch < sequence.epoch:
            raise ValueError(f"{request_id} runs under epoch {sequence.epoch}, which {epoch} does not follow")
        if sequence.tokens >= self.limit_tokens(hold=False):
            raise CapacityError(f"{request_id} fills this instance; continue it on a larger one")
        sequence.hold = False
        sequence.epoch = sequence.epoch if epoch is None else epoch
        self._run(sequence)

    def find(self, request_id: str, status: SequenceStatus) -> Sequence:
        """The sequence, which must be in this status. Raises UnknownRequest."""
        sequence = self.sequences.get(request_id)
        if sequence is None or sequence.status is not status:
            present = "not here" if sequence is None else sequence.status.value
            raise UnknownRequest(f"{request_id} is {present}, not {status.value}")
        return sequence

    def remove(self, request_id: str, epoch: int | None = None) -> bool:
        """Forget a request, whatever its status, and free its blocks; with ``epoch``, only of that epoch or older.

        Returns whether there was one.
        """
        known = self.sequences.get(request_id) or self.incoming.get(request_id)
        if known is None or (epoch is not None and known.epoch > epoch):
            return False
        if isinstance(known, Sequence):
            del self.sequences[request_id]
            if known.status is SequenceStatus.RUNNING:
                self._leave(known)
            elif known.status is SequenceStatus.WAITING:
                self.waiting.remove(known)
        else:
            del self.incoming[request_id]
        self._held_back = None
        self.pool.free(known.block_ids)
        return True

    def check_integrity(self) -> None:
        """Recount all blocks from the sequences that hold them. Raises IntegrityError."""
        tables: list[Iterable[int]] = [sequence.block_ids for sequence in self.sequences.values()]
        tables += [incoming.block_ids for incoming in self.incoming.values()]
        self.pool.check_integrity(tables)

    @property
    def _pool_tokens(self) -> int:
        return self.pool.total_blocks * self.pool.block_tokens

    @property
    def _kept_free(self) -> int:
        # Alone, a sequence may have the whole pool; otherwise one that needs the last blocks would wait for ever.
        return self._watermark_blocks if self.running else 0

    def _check_fits(self, spec: SequenceSpec, *, hold: bool) -> None:
        if not spec.prompt_token_ids or len(spec.output_token_ids) >= spec.sampling.max_output_tokens:
            raise ValueError(f"{spec.request_id} has nothing to generate")
        limit = self.limit_tokens(hold=hold)
        if spec.tokens >= limit or spec.tokens > self._pool_tokens:
            raise CapacityError(
                f"{spec.request_id} has {spec.tokens} tokens; this instance takes {min(limit - 1, self._pool_tokens)}"
            )

    def _check_newer(self, request_id: str, epoch: int) -> None:
        known = self.sequences.get(request_id) or self.incoming.get(request_id)
        if known is not None and known.epoch >= epoch:
            raise DuplicateRequest(f"{request_id} is here under epoch {known.epoch}, so epoch {epoch} is not taken")

    def _new_sequence(self, spec: SequenceSpec, *, hold: bool, now_s: float) -> Sequence:
        self._arrivals += 1
        sequence = self._make_sequence(spec, arrival=self._arrivals, queued_at_s=now_s, hold=hold)
        self.sequences[spec.request_id] = sequence
        return sequence

    def _run(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=attrgetter("rank"))

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._held_back = None

    def _make_room(self, blocks: int, *, wanted_by: Sequence) -> list[Sequence]:
        """Preempt one after another until ``blocks`` are free or ``wanted_by`` is itself preempted."""
        victims: list[Sequence] = []
        if blocks <= self.pool.free_blocks:
            return victims
        for victim in self.preempted_first():
            victims.append(victim)
            self._preempt(victim)
            if blocks <= self.pool.free_blocks or victim is wanted_by:
                break
        return victims

    def _preempt(self, sequence: Sequence) -> None:
        # Its tokens stay: when its turn comes again, all of their KV is computed anew and it goes on where it was.
        self._leave(sequence)
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []
        sequence.computed_tokens = 0
        sequence.preemptions += 1
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence, key=attrgetter("turn"))
        self.preemptions += 1

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence the blocks of all its tokens, cached ones first; False when there are too few."""
        cached: list[int] = []
        if self._prefix_caching:
            # The last token is always computed: its logits are what the next one is sampled from.
            usable_blocks = (sequence.tokens - 1) // self.pool.block_tokens
            cached = self.pool.acquire_prefix(self._digests(sequence, usable_blocks)[:usable_blocks])
        blocks = self.pool.blocks_for(sequence.tokens) - len(cached)
        if blocks + self._kept_free > self.pool.free_blocks or not self._may_come_back(sequence):
            self.pool.free(cached)
            return False
        sequence.block_ids = cached + self.pool.allocate(blocks)
        sequence.published_blocks = len(cached)
        sequence.computed_tokens = len(cached) * self.pool.block_tokens
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed_tokens
        return True

    def _may_come_back(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence need not be held back for want of memory to come."""
        if not sequence.preemptions:
            return True
        if self._held_back is not sequence:
            # As time passes the peak of those that run stays as it is: asked again is after one of them has left.
            blocks = self.pool.free_blocks + sum(len(running.block_ids) for running in self.running)
            comes_back = self._expected.may_come_back(
                sequence, self.running, blocks=blocks, block_tokens=self.pool.block_tokens
            )
            self._held_back = None if comes_back else sequence
        return self._held_back is None

    def _digests(self, sequence: Sequence, blocks: int) -> list[bytes]:
        """Digests of at least the first ``blocks`` blocks, all full, computed once per sequence."""
        digests = sequence.block_digests
        for index in range(len(digests), blocks):
            first = index * self.pool.block_tokens
            token_ids = sequence.token_ids[first : first + self.pool.block_tokens]
            digests.append(block_digest(digests[-1] if digests else b"", token_ids))
        return digests
