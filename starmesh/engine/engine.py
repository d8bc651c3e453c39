"""The engine core: turns schedules into batches, sampled tokens into outputs, and decides when a sequence ends.

Owns the rules of ending (EOS, stop strings, lengths), the survival of failed steps, and the instance's load figures.
Scheduling is ``scheduler``'s, forwards and sampling are the executor's, and ``thread`` keeps it off the event loop:
nothing here is asynchronous or thread-safe, and every call acts at once, between steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starmesh.clock import Clock
from starmesh.engine.batch import Batch, BatchItem, Executor, StepResult
from starmesh.engine.block_pool import BlockPool, IntegrityError
from starmesh.engine.scheduler import Chunk, Scheduler
from starmesh.engine.sequence import MakeSequence, Sequence, SequenceStatus
from starmesh.types import FinishReason, HiddenLayout, InstanceLoad, SequenceSpec

logger = logging.getLogger(__name__)

# Weight of the newest step in the exponential average of step times: about the last ten steps count.
STEP_AVERAGE_WEIGHT = 0.1
HIDDEN_EVERY_TOKENS = 20
"""How often the paper (section Predictor) takes a sequence's hidden state while it decodes."""


class StopChecker(Protocol):
    """Watches one sequence's output for its stop strings."""

    def feed(self, token_id: int) -> bool:
        """Take the next output token; whether the text so far contains a stop string."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of an engine; see ``Scheduler`` for how they bind. ``eos_token_ids`` and ``max_sequence_tokens`` (the
    context length) are the model's. Hidden states are taken at every ``hidden_every_tokens``-th output token."""

    eos_token_ids: frozenset[int]
    max_sequence_tokens: int
    max_step_tokens: int = 256
    max_sequences: int = 64
    max_waiting_sequences: int = 256
    prefix_caching: bool = False
    watermark: float = 0.01
    hidden_every_tokens: int = HIDDEN_EVERY_TOKENS

    def __post_init__(self) -> None:
        if self.hidden_every_tokens < 1:
            raise ValueError(f"hidden states are taken every 1 token or more, not {self.hidden_every_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOutput:
    """What a step made of one sequence.

    ``offset`` counts the output tokens before ``token_ids``. ``finish_reason`` is set when it ended, ``error`` when the
    engine gave it up because a step failed (it may be tried again elsewhere): in both cases nothing of it is left here.
    ``hidden_state`` is [layers, width] float32 in the executor's array type, at the last token computed, which is the
    ``offset``-th output token (0: the prompt's last); None where none is due. It may be a view of the step's array, so
    copy it to keep it. ``cached_tokens`` were found in the prefix cache and ``queue_duration_s`` passed before its
    first step. Of a sequence that is held from now on, ``held_block_ids`` have the KV of its ``resident_tokens``: to
    ask for them would take as long as the next step does.
    """

    request_id: str
    epoch: int
    offset: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    hidden_state: Any = None
    cached_tokens: int = 0
    queue_duration_s: float = 0.0
    held_block_ids: tuple[int, ...] = ()
    resident_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ExportedSequence:
    """A sequence taken out of the batch; ``block_ids`` hold the KV of its first ``resident_tokens`` tokens.
    ``preemptions`` as in ``SequenceProgress``."""

    spec: SequenceSpec
    block_ids: tuple[int, ...]
    resident_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class SequenceProgress:
    """A sequence in the batch. ``full_block_ids`` hold its first blocks; their KV changes no more. ``preemptions``
    counts how often it has lost its blocks here: block ids told before the last time are another sequence's by now."""

    full_block_ids: tuple[int, ...]
    tokens: int
    preemptions: int


class EngineCore:
    """Continuous batching over ``executor``'s KV pool.

    ``stop_checker`` makes the checker of a sequence with stop strings; it is fed every output token, those that the
    sequence came with first. Raises ValueError for limits that contradict each other.

    A simulator counts tokens (``make_sequence``, see ``Scheduler``) and blocks (``pool``, of the executor's size) in
    its own way, and recounts its pools when it likes (``checks_when_idle``).
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        *,
        stop_checker: Callable[[SequenceSpec], StopChecker],
        clock: Clock,
        pool: BlockPool | None = None,
        make_sequence: MakeSequence = Sequence.from_spec,
        checks_when_idle: bool = True,
    ) -> None:
        self._executor = executor
        self._config = config
        self._stop_checker = stop_checker
        self._clock = clock
        self._pool = pool or BlockPool(executor.total_blocks, block_tokens=executor.layout.block_tokens)
        self._checks_when_idle = checks_when_idle
        self._scheduler = Scheduler(
            self._pool,
            max_step_tokens=config.max_step_tokens,
            max_sequences=config.max_sequences,
            max_waiting_sequences=config.max_waiting_sequences,
            max_sequence_tokens=config.max_sequence_tokens,
            prefix_caching=config.prefix_caching,
            watermark=config.watermark,
            make_sequence=make_sequence,
        )
        self._stop_checkers: dict[str, StopChecker] = {}
        self._stalled = False
        self._step_duration_s = 0.0
        self._output_tokens = 0
        self.on_step: Callable[[float, int], None] | None = None
        """Set before the first step by who measures: hears of each that succeeded, its seconds and its sequences."""

    def __repr__(self) -> str:
        running, waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        return f"<EngineCore running={running} waiting={waiting} {self._pool!r}>"

    @property
    def hidden_layout(self) -> HiddenLayout | None:
        """What its hidden states are made of; None when it keeps none. May be read from any thread."""
        return self._executor.hidden_layout

    @property
    def idle(self) -> bool:
        """Whether no sequence runs or waits. Held sequences and reservations may still have blocks."""
        return not self._scheduler.running and not self._scheduler.waiting

    @property
    def runnable(self) -> bool:
        """Whether ``step`` may get anything done. False while idle, and when the last step found that all wait for
        blocks that only another call can free."""
        return not self.idle and not self._stalled

    @property
    def scheduler(self) -> Scheduler:
        """Its scheduler, to be read: every change of it is a call of the core."""
        return self._scheduler

    @property
    def step_duration_s(self) -> float:
        """Exponential average of the durations of its steps."""
        return self._step_duration_s

    @property
    def output_tokens(self) -> int:
        """Tokens that it has put out."""
        return self._output_tokens

    def add(self, spec: SequenceSpec, *, hold: bool = False) -> None:
        """Queue a sequence to be computed from its tokens (prompt, and outputs of a recovered one).

        With ``hold`` it is taken out of the batch, HELD with its blocks, once its next token is sampled, until
        ``release``; if it ends with that token nothing is held. An older epoch of the request is dropped: end its
        lease, if there is one. Raises DuplicateRequest, CapacityError, QueueFull, and ValueError for a sequence that
        has nothing to generate.
        """
        checker = self._checker_for(spec)
        self._scheduler.add(spec, hold=hold, now_s=self._clock.now_s())
        self._watch(spec.request_id, checker)

    def reserve(self, request_id: str, epoch: int, tokens: int) -> tuple[int, ...] | None:
        """Take blocks for an incoming sequence of ``tokens`` tokens (headroom included), to be pulled into.

        None when there is no room now. An older epoch of the request is cancelled first. Raises CapacityError, and
        DuplicateRequest when the same or a newer epoch is here.
        """
        block_ids = self._scheduler.reserve(request_id, epoch, tokens)
        self._settle()
        return block_ids

    def start(self, spec: SequenceSpec, resident_tokens: int) -> None:
        """Run a reserved sequence whose blocks now hold the KV of its first ``resident_tokens`` tokens.

        Raises UnknownRequest when it is not reserved under this epoch, CapacityError, or ValueError when tokens and
        blocks don't go together.
        """
        checker = self._checker_for(spec)
        self._scheduler.start(spec, resident_tokens, now_s=self._clock.now_s())
        self._watch(spec.request_id, checker)

    def held(self, request_id: str) -> tuple[tuple[int, ...], int]:
        """Block ids and resident tokens of a held sequence. Raises UnknownRequest."""
        sequence = self._scheduler.find(request_id, SequenceStatus.HELD)
        return self._resident_blocks(sequence), sequence.computed_tokens

    def export(self, request_id: str) -> ExportedSequence:
        """Take a running sequence out of the batch and hold its blocks until ``release`` or ``resume``.

        Raises UnknownRequest, also for one that waits: it has no blocks.
        """
        sequence = self._scheduler.find(request_id, SequenceStatus.RUNNING)
        self._scheduler.hold(sequence)
        self._settle()
        return ExportedSequence(
            sequence.spec(), self._resident_blocks(sequence), sequence.computed_tokens, sequence.preemptions
        )

    def resume(self, request_id: str, *, epoch: int | None = None) -> None:
        """Undo ``export``: the sequence goes on here at the next step, under ``epoch`` if one is given.

        Raises UnknownRequest or CapacityError, and ValueError for an epoch older than its own.
        """
        self._scheduler.resume(request_id, epoch)
        self._stalled = False

    def progress(self, request_id: str) -> SequenceProgress:
        """How far a running sequence is. Raises UnknownRequest, also for one that waits or is held."""
        sequence = self._scheduler.find(request_id, SequenceStatus.RUNNING)
        full_blocks = sequence.computed_tokens // self._pool.block_tokens
        return SequenceProgress(tuple(sequence.block_ids[:full_blocks]), sequence.tokens, sequence.preemptions)

    def preempted_first(self) -> tuple[str, ...]:
        """The running requests in the order in which they would be preempted."""
        return tuple(sequence.request_id for sequence in self._scheduler.preempted_first())

    def expect(self, expected_tokens: Mapping[str, int]) -> None:
        """Take over at how many tokens, prompt and output, requests are expected to end; see ``Scheduler.expect``."""
        self._scheduler.expect(expected_tokens)

    def cancel(self, request_id: str, epoch: int | None = None) -> bool:
        """Drop a request, whatever its status, and free its blocks; with ``epoch``, only that epoch or an older one.

        Returns whether there was one. No output reports it.
        """
        removed = self._scheduler.remove(request_id, epoch)
        self._settle()
        return removed

    def release(self, request_id: str, epoch: int | None = None) -> bool:
        """Free a held sequence's blocks; ``epoch`` as in ``cancel``. Returns False when none is held."""
        sequence = self._scheduler.sequences.get(request_id)
        if sequence is None or sequence.status is not SequenceStatus.HELD:
            return False
        return self.cancel(request_id, epoch)

    def step(self) -> list[SequenceOutput]:
        """Run one step; one output for each sequence that got a token or was given up.

        A failing executor costs the sequences of its batch, never the engine. Raises IntegrityError only.
        """
        schedule = self._scheduler.schedule()
        self._stalled = not schedule.chunks and not schedule.preempted
        if not schedule.chunks:
            return []
        started_s = self._clock.now_s()
        for chunk in schedule.chunks:
            if chunk.sequence.queue_duration_s is None:
                chunk.sequence.queue_duration_s = started_s - chunk.sequence.queued_at_s
        try:
            batch = Batch(tuple(map(self._batch_item, schedule.chunks)))
            sampled = _sampled(batch, self._executor.execute(batch))
        except Exception as error:
            # Out of memory included. What the step wrote is unknown, but only into blocks that are freed here.
            logger.exception("a step of %d sequences failed", len(schedule.chunks))
            outputs = [self._give_up(chunk.sequence, error) for chunk in schedule.chunks]
        else:
            outputs = self._commit(schedule.chunks, sampled)
            duration_s = self._clock.now_s() - started_s
            self._step_duration_s = _step_average_s(self._step_duration_s, duration_s)
            if self.on_step is not None:
                self.on_step(duration_s, len(schedule.chunks))
        self._settle()
        return outputs

    def take_token(self, sequence: Sequence, token_id: int, hidden_state: Any = None) -> SequenceOutput:
        """Give a running sequence its next token, and end or hold it if that is due. ``step`` does so, and a simulator
        for steps that it makes by itself."""
        offset = sequence.output_tokens
        try:
            finish_reason = self._finish_reason(sequence, token_id)
        except Exception as error:
            logger.exception("the stop checker of %s failed", sequence.request_id)
            return self._give_up(sequence, error)
        sequence.token_ids.append(token_id)
        self._output_tokens += 1
        if finish_reason is not None:
            self._scheduler.remove(sequence.request_id)
        held = finish_reason is None and sequence.hold
        if held:
            self._scheduler.hold(sequence)
        return SequenceOutput(
            request_id=sequence.request_id,
            epoch=sequence.epoch,
            offset=offset,
            token_ids=(token_id,),
            finish_reason=finish_reason,
            hidden_state=hidden_state,
            cached_tokens=sequence.cached_tokens,
            queue_duration_s=sequence.queue_duration_s or 0.0,
            held_block_ids=self._resident_blocks(sequence) if held else (),
            resident_tokens=sequence.computed_tokens if held else 0,
        )

    def note_steps(self, durations_s: Iterable[float], output_tokens: int) -> None:
        """Count steps that a simulator has made by itself, and the tokens of those that went on with them."""
        average_s = self._step_duration_s
        for duration_s in durations_s:
            average_s = _step_average_s(average_s, duration_s)
        self._step_duration_s = average_s
        self._output_tokens += output_tokens

    def load(self) -> InstanceLoad:
        """The instance's load now. Reserved sequences count in ``free_blocks`` only, until they start."""
        scheduler = self._scheduler
        return InstanceLoad(
            total_blocks=self._pool.total_blocks,
            free_blocks=self._pool.free_blocks,
            running_sequences=len(scheduler.running),
            waiting_sequences=len(scheduler.waiting),
            resident_tokens=sum(sequence.computed_tokens for sequence in scheduler.sequences.values()),
            step_duration_s=self._step_duration_s,
            output_tokens=self._output_tokens,
            preemptions=scheduler.preemptions,
            sequences=tuple(sequence.load() for sequence in scheduler.sequences.values()),
        )

    def check_integrity(self) -> None:
        """Recount all blocks. Runs by itself whenever the engine has become idle, if not told otherwise. Raises
        IntegrityError."""
        self._scheduler.check_integrity()
        if not self._stop_checkers.keys() <= self._scheduler.sequences.keys():
            raise IntegrityError("stop checkers outlived their sequences")

    def _checker_for(self, spec: SequenceSpec) -> StopChecker | None:
        if not spec.sampling.stop_strings:
            return None
        checker = self._stop_checker(spec)
        if any(checker.feed(token_id) for token_id in spec.output_token_ids):
            raise ValueError(f"{spec.request_id} has a stop string in its output already")
        return checker

    def _watch(self, request_id: str, checker: StopChecker | None) -> None:
        self._stop_checkers.pop(request_id, None)  # an older epoch's
        if checker is not None:
            self._stop_checkers[request_id] = checker
        self._stalled = False

    def _commit(self, chunks: tuple[Chunk, ...], sampled: list[tuple[int, Any] | None]) -> list[SequenceOutput]:
        outputs = []
        for chunk, sample in zip(chunks, sampled, strict=True):
            sequence = chunk.sequence
            self._scheduler.advance(sequence, chunk.tokens)
            if sample is None:
                continue
            outputs.append(self.take_token(sequence, *sample))
        return outputs

    def _batch_item(self, chunk: Chunk) -> BatchItem:
        # The lists are the sequence's own, not copies: a long context would cost more to copy than to schedule. Nothing
        # changes them until the step is over.
        sequence = chunk.sequence
        start = sequence.computed_tokens
        catches_up = chunk.tokens == sequence.uncomputed_tokens
        return BatchItem(
            request_id=sequence.request_id,
            token_ids=sequence.token_ids[start : start + chunk.tokens],
            start=start,
            block_ids=sequence.block_ids,
            sampling=sequence.sampling,
            history=sequence.token_ids if catches_up else None,
            wants_hidden_state=catches_up and self._hidden_state_is_due(sequence),
            prompt_tokens=sequence.prompt_tokens,
        )

    def _hidden_state_is_due(self, sequence: Sequence) -> bool:
        """At every k-th token, and where a prefill ends. A sequence that goes on to its limit is not predicted."""
        if self._executor.hidden_layout is None or sequence.sampling.ignore_eos:
            return False
        return sequence.hold or sequence.output_tokens % self._config.hidden_every_tokens == 0

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Whether and why the sequence ends with this next token. The EOS token is part of the output, as in the
        ``generate`` of transformers."""
        if token_id in self._config.eos_token_ids and not sequence.sampling.ignore_eos:
            return FinishReason.STOP
        checker = self._stop_checkers.get(sequence.request_id)
        if checker is not None and checker.feed(token_id):
            return FinishReason.STOP
        if sequence.output_tokens + 1 >= sequence.sampling.max_output_tokens:
            return FinishReason.LENGTH
        if sequence.tokens + 1 >= self._scheduler.limit_tokens(hold=sequence.hold):
            return FinishReason.LENGTH
        return None

    def _give_up(self, sequence: Sequence, error: Exception) -> SequenceOutput:
        self._scheduler.remove(sequence.request_id)
        return SequenceOutput(
            request_id=sequence.request_id,
            epoch=sequence.epoch,
            offset=sequence.output_tokens,
            error=f"a step failed: {type(error).__name__}: {error}",
        )

    def _resident_blocks(self, sequence: Sequence) -> tuple[int, ...]:
        return tuple(sequence.block_ids[: self._pool.blocks_for(sequence.computed_tokens)])

    def _settle(self) -> None:
        """After anything that may have ended sequences or freed blocks."""
        self._stalled = False
        for request_id in self._stop_checkers.keys() - self._scheduler.sequences.keys():
            del self._stop_checkers[request_id]
        if self._checks_when_idle and self.idle:
            self.check_integrity()


def _step_average_s(average_s: float, duration_s: float) -> float:
    return average_s + STEP_AVERAGE_WEIGHT * (duration_s - average_s) if average_s else duration_s


def _sampled(batch: Batch, result: StepResult) -> list[tuple[int, Any] | None]:
    """Token and hidden state for each item, None for those that don't sample. Raises ValueError for a result that does
    not match the batch."""
    if [token_id is not None for token_id in result.token_ids] != [item.samples for item in batch.items]:
        raise ValueError("the executor's tokens do not match the batch")
    wanted = sum(item.wants_hidden_state for item in batch.items)
    if wanted != (0 if result.hidden_states is None else len(result.hidden_states)):
        raise ValueError("the executor's hidden states do not match the batch")
    rows = iter(result.hidden_states) if wanted else iter(())
    return [
        None if token_id is None else (token_id, next(rows) if item.wants_hidden_state else None)
        for item, token_id in zip(batch.items, result.token_ids, strict=True)
    ]
