"""The source's calls to the target of one migration, as messages on virtual time, and what their answers amount to.

Owns which call an answer belongs to: one that nobody waits for is dropped. A call that finds nobody, or whose target
dies, is answered with None. Owns no deadline: those are the tables' timers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from starmesh.migration.target_effects import (
    AnswerCommitted,
    AnswerCopied,
    AnswerDeclined,
    AnswerRefused,
    AnswerReserved,
)
from starmesh.migration.target_record import AbortAsked, CommitAsked, CopyAsked
from starmesh.migration.terms import Cause, Terms
from starmesh.sim.network import Network

Answer: TypeAlias = AnswerReserved | AnswerRefused | AnswerCopied | AnswerCommitted | AnswerDeclined | None
"""What the target says; None when it cannot say, or cannot be reached."""

Reply: TypeAlias = Callable[[Answer], None]


class Receiver(Protocol):
    """Whoever takes calls for the targets. Each is called once the message has come to the target."""

    def reserve(self, terms: Terms, *, blocks: int, max_tokens: int, reply: Reply) -> None:
        """Set blocks aside for a sequence that may grow to ``max_tokens``."""
        ...

    def ask(self, terms: Terms, asked: CopyAsked | CommitAsked, reply: Reply) -> None:
        """Pull; for a commit, claim the sequence too and go on with it."""
        ...

    def abort(self, terms: Terms, asked: AbortAsked) -> None:
        """Nobody waits for it."""
        ...


class TargetCalls:
    """One migration's, of which one at a time waits for its answer; ``answered`` hears that."""

    def __init__(self, network: Network, receiver: Receiver, terms: Terms, answered: Callable[[Answer], None]) -> None:
        self._network = network
        self._receiver = receiver
        self._terms = terms
        self._answered = answered
        self._number = 0
        self._waits = False

    def reserve(self, blocks: int, *, max_tokens: int) -> None:
        """Ask for blocks."""
        self._call(lambda reply: self._receiver.reserve(self._terms, blocks=blocks, max_tokens=max_tokens, reply=reply))

    def ask(self, asked: CopyAsked | CommitAsked) -> None:
        """Ask for a pull, or the commit."""
        self._call(lambda reply: self._receiver.ask(self._terms, asked, reply))

    def target_died(self) -> None:
        """Nobody will answer."""
        self._take(self._number, None)

    def close(self, abort: Cause | None) -> None:
        """Wait for no answer any more; with ``abort``, tell the target once that nobody waits."""
        self._waits = False
        if abort is not None:
            asked = AbortAsked(abort)
            self._send(lambda: self._receiver.abort(self._terms, asked))

    def _call(self, do: Callable[[Reply], None]) -> None:
        self._number += 1
        self._waits = True
        number, terms = self._number, self._terms

        def reply(answer: Answer) -> None:
            self._network.message(terms.target_id, terms.source_id, lambda: self._take(number, answer))

        self._send(lambda: do(reply), lost=lambda: self._take(number, None))

    def _send(self, do: Callable[[], None], *, lost: Callable[[], None] | None = None) -> None:
        self._network.message(self._terms.source_id, self._terms.target_id, do, lost=lost)

    def _take(self, number: int, answer: Answer) -> None:
        if self._waits and number == self._number:
            self._waits = False
            self._answered(answer)
