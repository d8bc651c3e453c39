"""The world on virtual time: every message, call, pull, step and timer has its moment, drawn when it is first seen.

Where ``world`` lets anything happen at any time, this is how things go in a cluster: a frozen sequence waits out its
timers while others decode on, and a slow pull is slow against the steps. Nothing here waits for a real clock. What goes
wrong on the way is ``Faults``'; with ``Faults()`` nothing does, and all that is under way comes to its end.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from starmesh.clock import VirtualClock
from starmesh.migration import target_record as tr
from starmesh.migration.target_effects import AnswerCommitted
from starmesh.migration.terms import EPOCHS_PER_MIGRATION, LedgerSilent
from tests.migration.checks import check
from tests.migration.engine_model import Sequence, blocks_for
from tests.migration.instance_model import Instance
from tests.migration.target_model import Pulling
from tests.migration.wire_model import LedgerCall
from tests.migration.world import World

Do = Callable[[], Any]

SPREAD: Final = (0.2, 0.6, 1.0, 1.4, 5.0)
"""What takes a second at the median takes one of these."""
CALL_DEADLINE_S: Final = 4.0
LEDGER_DEADLINE_S: Final = 0.3
LATE_S: Final = 1.0
"""Until a claim is done that the ledger has not answered."""


class Killed(Exception):
    """The process that was doing something is no more; what it was doing ends here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong. ``drop`` and ``double`` are chances of a message, ``pulls_fail`` is one of a block."""

    drop: float = 0.0
    double: float = 0.0
    pulls_fail: float = 0.0
    slow_pulls: bool = False
    """A block takes longer than some steps."""
    lose_commit_calls: bool = False
    lose_commit_answers: bool = False
    migrations_unheard: bool = False
    """The ledger answers neither a migration's claims nor anybody's questions."""
    ledger_silent: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """``thing`` is under way: when it happens, how ties break, and what then."""

    at_s: float
    number: int
    name: str
    thing: object
    do: Do


class Timeline:
    """Runs ``world`` in the order of time. The seconds are medians."""

    def __init__(self, world: World, draw: random.Random, *, verbose: bool = False) -> None:
        self.world = world
        self.draw = draw
        self.verbose = verbose
        self.faults = Faults()
        self.step_s = draw.choice((0.01, 0.05))
        self.message_s = self.step_s * draw.choice((0.01, 0.1, 0.3))
        self.ledger_s = self.step_s * draw.choice((0.01, 0.3))
        self.fails_fast = draw.random() < 0.5
        """Whether a call to a process that is gone fails at once, or by its deadline."""
        self._clock = VirtualClock()
        self._numbers = 0
        self._later: list[Due] = []
        self._known: dict[int, Due] = {}
        self._due: dict[int, Due] = {}

    @property
    def now_s(self) -> float:
        return self._clock.now_s()

    def later(self, after_s: float, name: str, do: Do) -> None:
        """Have something else happen, ``after_s`` from now."""
        self._numbers += 1
        self._later.append(Due(self.now_s + after_s, self._numbers, name, object(), do))

    def turn(self) -> bool:
        """Do what is due next and check the world; whether there was anything."""
        self._known, self._due = self._due, {id(due.thing): due for due in self._later}
        self._look()
        if not self._due:
            return False
        due = min(self._due.values(), key=lambda due: (due.at_s, due.number))
        del self._due[id(due.thing)]
        self._later = [other for other in self._later if other is not due]
        self._clock.advance(max(0.0, due.at_s - self.now_s))
        self.world.now_s = self.now_s
        told = len(self.world.log)
        with contextlib.suppress(Killed):
            due.do()
        if self.verbose:
            print(f"{self.now_s:9.4f} {due.name}", *(f"\n{'':14}{line}" for line in self.world.log[told:]))
        check(self.world)
        return True

    def _see(self, thing: object, median_s: float, name: str, do: Do, *, at_s: float | None = None) -> None:
        due = self._known.get(id(thing))
        if due is None or at_s not in (None, due.at_s):
            self._numbers += 1
            if at_s is None:
                at_s = self.now_s + median_s * self.draw.choice(SPREAD)
            due = Due(at_s, self._numbers, name, thing, do)
        self._due[id(thing)] = due

    def _look(self) -> None:
        """Find all that is under way, in an order that the seed alone decides. What was known keeps its moment."""
        world, see = self.world, self._see
        for life in world.lives.values():
            self._look_into(life)
        for message in world.messages:
            see(message, self.message_s, "message", partial(self._carry, message))
        for call in world.calls.values():
            see(call, CALL_DEADLINE_S, "deadline of a call", partial(world.fail_call, call.number))
        for asked in world.ledger_calls:
            if asked.at_s <= self.now_s:
                see(asked, self.ledger_s, "ledger", partial(self._ask, asked))
            else:
                see(asked, 0.0, "ledger", partial(self._ask, asked), at_s=asked.at_s)
        for answer in world.ledger_answers:
            see(answer, self.ledger_s, "answer of the ledger", partial(self._tell, answer))
        for claim in world.late_claims:
            see(claim, LATE_S, "late claim", partial(self._late, claim))
        for link in world.links.values():
            if link.down and not link.broken:
                see(link.down[0], self.message_s, f"{link.instance.id} to router", partial(world.down, link))
            if link.up and not link.broken:
                see(link.up[0], self.message_s, f"router to {link.instance.id}", partial(world.up, link))
        for link in world.parting:
            see(link, self.message_s, "part", partial(world.part, link))

    def _look_into(self, life: Instance) -> None:
        world, see = self.world, self._see
        if life.engine_calls:
            see(life.engine_calls[0], self.step_s, f"{life.id} engine call", partial(first_of, life.engine_calls))
        if life.answers:
            see(life.answers[0], self.message_s, f"{life.id} engine answer", partial(first_of, life.answers))
        for pull in life.pulls:
            block_s = (10 if self.faults.slow_pulls else 0.1) * self.step_s
            see(pull, block_s, f"{life.id} pull", partial(self._pull, life, pull))
        for sequence in life.sequences.values():
            request_id = sequence.request_id
            if sequence.status == "running":
                see(sequence, self.step_s, f"{life.id} step {request_id}", partial(self._step, life, sequence))
            elif sequence.status == "waiting" and blocks_for(len(sequence.token_ids)) <= len(life.free):
                see(sequence, self.step_s, f"{life.id} readmit {request_id}", partial(life.readmit, request_id))
        for key, end in [*life.sources.items(), *life.targets.items()]:
            if end.timer_at_s is not None:
                see(end, 0.0, f"{life.id} timer", partial(world.fire, life, key), at_s=end.timer_at_s)

    def _step(self, life: Instance, sequence: Sequence) -> None:
        # What was readmitted, or stepped and preempted since, is due all the same.
        if sequence.status == "running":
            life.step(sequence.request_id)
        else:
            life.readmit(sequence.request_id)

    def _pull(self, life: Instance, pull: Pulling) -> None:
        if self.draw.random() < self.faults.pulls_fail:
            life.pull_ended(pull, tr.PullFailed())
        else:
            life.pull_some(pull)

    def _carry(self, message: tuple[Instance, tuple[Any, ...]]) -> None:
        receiver, body = message
        faults, chance = self.faults, self.draw.random()
        is_call = body[0] == "call"
        lost = chance < faults.drop
        if is_call and isinstance(body[3][1], tr.CommitAsked):
            lost = lost or faults.lose_commit_calls
        elif body[0] == "answer" and isinstance(body[2], AnswerCommitted):
            lost = lost or faults.lose_commit_answers
        doubled = body[0] != "answer" and not lost and chance > 1 - faults.double
        if not doubled:
            self.world.messages.pop(position(self.world.messages, message))
        if lost:
            return
        if is_call and not receiver.alive and self.fails_fast and body[1] in self.world.calls:
            self.world.fail_call(body[1])
        else:
            self.world.receive(receiver, body)

    def _ask(self, call: LedgerCall) -> None:
        index = position(self.world.ledger_calls, call)
        of_migration = call.new is None or (
            call.expected is not None and call.new.epoch - call.expected.epoch <= EPOCHS_PER_MIGRATION
        )
        if not self.faults.ledger_silent and not (self.faults.migrations_unheard and of_migration):
            self.world.ask(index)
            return
        self.world.ledger_calls.pop(index)
        if call.new is not None:
            what = self.draw.choice(("done", "late", "never"))
            if what == "done":
                self.world.execute(call)
            elif what == "late":
                self.world.late_claims.append(call)
        self.later(LEDGER_DEADLINE_S, "ledger silent", partial(call.answer, LedgerSilent()))

    def _tell(self, answer: object) -> None:
        self.world.tell(position(self.world.ledger_answers, answer))

    def _late(self, claim: LedgerCall) -> None:
        self.world.late(position(self.world.late_claims, claim))


def position(things: Row[object], thing: object) -> int:
    """Where this very thing is, among others that may be equal."""
    return next(index for index, other in enumerate(things) if other is thing)


def first_of(waiting: deque[Do]) -> None:
    """Do what has waited longest."""
    waiting.popleft()()
