"""One request in flight: where the decode link's reader, the request's life and the client's writer meet.

Owns the request's stream state and who is to be told of a change. Owns no policy of what happens next (``life``).
Everything here is a plain call on the event loop: a token costs no task and no queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from services.router.answer import Answer, Detokenizer, Piece
from services.router.stream import TokenStream, Verdict
from starmesh.rpc import convert
from starmesh.rpc.status import StatusError, from_sequence_status
from starmesh.telemetry.bucket_counts import BucketCounts
from starmesh.types import FinishReason, Ownership
from starmesh.v1 import decode_pb2, sequence_pb2


class InstanceLost(Exception):
    """An instance died, hangs or cannot be reached; what it had of ours is gone."""

    def __init__(self, instance_id: str, reason: str) -> None:
        super().__init__(f"{instance_id}: {reason}")
        self.instance_id = instance_id
        self.reason = reason


def superseded() -> StatusError:
    """What a client hears on a stream in place of which another reads on."""
    return StatusError(grpc.StatusCode.ABORTED, "another stream reads on in place of this one")


@dataclass(frozen=True, slots=True)
class Refused:
    """The instance has given the sequence up and freed it."""

    status: StatusError


@dataclass(frozen=True, slots=True)
class Lost:
    """The instance is gone."""

    error: InstanceLost


@dataclass(frozen=True, slots=True)
class Broken:
    """The instance still has the sequence, but its tokens cannot be used: some are missing."""

    description: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The sequence is complete. ``by_instance`` says whether the instance knows; if not, it must be told."""

    by_instance: bool


@dataclass(frozen=True, slots=True)
class Moved:
    """The sequence goes on under another owner, whose instance listens at ``address``: host:port."""

    owner: Ownership
    address: str


Outcome = Refused | Lost | Broken | Ended
"""What becomes of a sequence where it does not move."""


def _nobody(flight: Flight) -> None:
    """Tell nobody."""


class Flight:
    """A request from its acceptance to its last message."""

    def __init__(
        self,
        request_id: str,
        *,
        deadline_s: float,
        coalesce_window_s: float,
        resume_window_s: float = 0.0,
        key_id: str = "",
        stop_strings: tuple[str, ...] = (),
        output_token_ids: Sequence[int] = (),
        on_ready: Callable[[Flight], None],
    ) -> None:
        """``deadline_s`` is in the event loop's time. The client has ``output_token_ids`` already. ``key_id`` names the
        API key whose request it is. ``on_ready`` is called when ``take`` has something or ``error`` is set, perhaps
        more often than needed, never less."""
        self.request_id = request_id
        self.key_id = key_id
        self.stop_strings = stop_strings
        self.deadline_s = deadline_s
        self.resume_window_s = resume_window_s
        self.brought_tokens = len(output_token_ids)
        """Output tokens that the client brought along; all others are made here."""
        self.reader = 0
        """Which of the client's streams has the answer, counted from 0: each that resumes takes it from the last."""
        self.prompt_tokens = 0
        self.stream = TokenStream()
        self.cached_tokens = 0
        self.recoveries = 0
        self.migrations = 0
        self.error: StatusError | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        """When the first and the newest token came, by ``time.monotonic``."""
        self.gaps: BucketCounts | None = None
        """Where the seconds between tokens are counted, if anywhere; tokens that come together end one gap."""
        self.on_next_token: Callable[[float], None] | None = None
        """Hears once when the next one comes."""
        self.stream.token_ids.extend(output_token_ids)
        self._answer: Answer | None = None
        self._window_s = coalesce_window_s
        self._on_ready = on_ready
        self._timer: asyncio.TimerHandle | None = None
        self._outcome: asyncio.Future[Outcome | Moved] | None = None
        self._on_newer_epoch: Callable[[int], None] | None = None

    def __repr__(self) -> str:
        return f"<Flight {self.request_id} {self.stream!r}>"

    @property
    def ended(self) -> bool:
        """Whether no more tokens will come."""
        return self.stream.finish_reason is not None or self.error is not None

    @property
    def serving(self) -> bool:
        """Whether ``take`` can have something: not before the text of the tokens that the client has is known."""
        return self._answer is not None

    @property
    def started(self) -> bool:
        """Whether any token has been made here."""
        return len(self.stream.token_ids) > self.brought_tokens

    # What the decode link calls.

    def deliver(self, output: sequence_pb2.SequenceOutput) -> None:
        """Take what an instance made."""
        # The common case first: this runs for every token.
        if output.finish_reason or output.HasField("failure"):
            self._deliver_end(output)
        else:
            # As a list: each look into a repeated field costs as much as its copy.
            self.accept(output.epoch, output.offset, output.token_ids[:], None)

    def _deliver_end(self, output: sequence_pb2.SequenceOutput) -> None:
        reason = convert.finish_reason(output.finish_reason)
        status = from_sequence_status(output.failure) if output.HasField("failure") else None
        if reason is FinishReason.CANCELLED:
            # Nobody here asked for it: the instance gave the sequence up, and it can go on elsewhere.
            status = StatusError(grpc.StatusCode.ABORTED, "the instance cancelled the sequence")
        self.accept(output.epoch, output.offset, output.token_ids, reason if status is None else None)
        if status is not None and output.epoch == self.stream.epoch:
            self._settle(Refused(status))

    def lost(self, error: InstanceLost) -> None:
        """The instance that has the sequence is gone."""
        self._settle(Lost(error))

    def moved(self, move: decode_pb2.SequenceMove) -> bool:
        """The instance that had the sequence says who goes on with it. Returns whether this request will go there;
        not if it has ended, or if the move is of the past."""
        if self.ended or move.epoch <= self.stream.epoch:
            return False
        return self._settle(Moved(Ownership(move.instance_id, move.epoch), move.address))

    # What the life calls.

    def begin(
        self, epoch: int, *, on_newer_epoch: Callable[[int], None] | None = None
    ) -> asyncio.Future[Outcome | Moved]:
        """Start to listen to a new owner; older ones are refused from now on. The future says how it ends.

        ``on_newer_epoch`` hears of an epoch that this owner has raised by itself: it took the sequence back from a
        migration that did not end.
        """
        self.stream.begin(epoch)
        self._on_newer_epoch = on_newer_epoch
        if self._outcome is not None:
            self._outcome.cancel()
        self._outcome = asyncio.get_running_loop().create_future()
        return self._outcome

    def accept(self, epoch: int, offset: int, token_ids: Sequence[int], reason: FinishReason | None) -> None:
        """Take tokens of an owner."""
        stream = self.stream
        known_epoch = stream.epoch
        verdict = stream.accept(epoch, offset, token_ids, reason)
        if token_ids and (verdict is Verdict.NEW or verdict is Verdict.END):
            now_s = time.monotonic()
            self._note_time(now_s)
            if self.on_next_token is not None:
                told, self.on_next_token = self.on_next_token, None
                told(now_s)
        if stream.epoch != known_epoch and self._on_newer_epoch is not None:
            self._on_newer_epoch(epoch)
        if verdict is Verdict.NEW:
            self._notify()
        elif verdict is Verdict.END:
            self._settle(Ended(by_instance=reason is not None))
            self._notify()
        elif verdict is Verdict.GAP:
            held = len(stream.token_ids)
            self._settle(Broken(f"epoch {epoch} continues at token {offset}, {held} are here"))

    def _note_time(self, now_s: float) -> None:
        if self.last_token_s is None:
            self.first_token_s = now_s
        elif self.gaps is not None:
            self.gaps.add(now_s - self.last_token_s)
        self.last_token_s = now_s

    def find_finish(self, eos_token_ids: frozenset[int]) -> bool:
        """End the stream if the accepted tokens end the sequence already; ``eos_token_ids`` is empty where they do
        not. Returns whether it has ended."""
        if self.ended:
            return True
        if self._answer is not None and self._answer.find_stop():
            # It has ended the stream itself; what is left is to tell the client's writer.
            self._notify()
            return True
        reason = self.stream.implied_finish(eos_token_ids)
        if reason is not None:
            self.end(reason)
        return self.ended

    def end(self, reason: FinishReason) -> None:
        """End the stream from this side, unless it has ended."""
        if self.stream.end(reason):
            self._settle(Ended(by_instance=False))
            self._notify()

    def fail(self, error: StatusError) -> None:
        """End the request with an error, unless it has ended."""
        if not self.ended:
            # It may be kept for a whole resume window.
            self.error = error.bare()
            self._notify()

    # What the client's writer calls.

    def read_anew(self, on_ready: Callable[[Flight], None]) -> int:
        """Give the answer to another stream of the client, which ``on_ready`` tells of news; the one that has it now is
        told to end. Nothing is to be taken before ``serve``. Returns the new ``reader``."""
        former = self._on_ready
        self.abandon()
        self._on_ready = on_ready
        self.reader += 1
        former(self)
        return self.reader

    def serve(self, detokenizer: Detokenizer, *, offset: int = 0) -> None:
        """Let ``take`` begin behind the first ``offset`` tokens, which ``detokenizer`` has been fed."""
        self._answer = Answer(self.stream, detokenizer, offset=offset)
        if self.stream.token_ids or self.ended:
            self._on_ready(self)

    def check_reader(self, reader: int) -> None:
        """Raise StatusError if another stream has taken the answer from ``reader``, who is to leave it alone then."""
        if reader != self.reader:
            raise superseded()

    def take(self) -> Piece | None:
        """The next piece; None when there is nothing new. Tokens come before ``error`` is to be looked at."""
        if self._answer is None:
            return None
        piece = self._answer.take()
        if piece is not None and piece.finish_reason is not None:
            # Detokenising may have found a stop string that the instance has not.
            self._settle(Ended(by_instance=False))
        return piece

    def abandon(self) -> None:
        """Nobody listens any more, or nobody does until ``read_anew``."""
        self._on_ready = _nobody
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _settle(self, outcome: Outcome | Moved) -> bool:
        """Decide what becomes of the sequence where it is. Returns False when that is decided, or nobody waits."""
        if self._outcome is None or self._outcome.done():
            return False
        self._outcome.set_result(outcome)
        return True

    def _notify(self) -> None:
        if not self._window_s:
            self._on_ready(self)
        # The first token and the end never wait.
        elif self.ended or self._answer is None or not self._answer.started:
            self._fire()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._window_s, self._fire)

    def _fire(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._on_ready(self)
