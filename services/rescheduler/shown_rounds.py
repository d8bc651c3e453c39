"""The last rounds, in the ledger, for people to look at: what was planned, what became of it, and why the rest stayed.

Owns what is kept of a round for that and for how long. Owns no decision, and no round waits for it to succeed: a ledger
that does not take it has rounds go on unseen.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from services.rescheduler.ending import Ending
from starmesh.ledger import Ledger, LedgerError
from starmesh.policy.rescheduling import Plan, PlanMemory
from starmesh.rounds import MAX_MOVES, MAX_ROUNDS, MAX_TEXT, MoveOutcome, RoundMove, RoundSummary
from starmesh.types import ClusterView, Role

log = logging.getLogger(__name__)

_KEPT_S: Final = 600.0
"""How long the rounds are still shown of a cluster that has no leader any more."""


class ShownRounds:
    """The rounds of ``leader`` and of those that led before it, newest first."""

    def __init__(self, ledger: Ledger, leader: str) -> None:
        self._ledger = ledger
        self._leader = leader
        self._rounds: tuple[RoundSummary, ...] = ()

    async def go_on(self) -> None:
        """Begin with what the last leader has shown. What it had under way is followed by nobody now."""
        try:
            found = await self._ledger.rounds()
        except LedgerError as error:
            log.debug("the rounds of the last leader are not to be had: %s", error)
            found = ()
        self._rounds = found
        self._change(lambda move: replace(move, outcome=MoveOutcome.FAILED, words="its leader was replaced"))

    def ended(self, ending: Ending) -> None:
        """Take note of what became of a move."""
        told = RoundMove(ending.migration, MoveOutcome(ending.outcome.value), ending.duration_s, ending.what[:MAX_TEXT])
        self._change(lambda move: told if move.migration == ending.migration else move)

    async def add(self, term: int, view: ClusterView, decided: Plan) -> None:
        """Show one more round."""
        self._settle(decided.memory)
        shown = summary(self._leader, term, view, decided)
        if self._rounds and not shown.moves and not self._rounds[0].moves and self._rounds[0].term == term:
            last, *others = self._rounds
            folded = replace(shown, first_s=last.first_s, rounds=last.rounds + 1)
            self._rounds = (folded, *others)
        else:
            self._rounds = (shown, *self._rounds[: MAX_ROUNDS - 1])
        try:
            await self._ledger.publish_rounds(self._rounds, ttl_s=_KEPT_S)
        except LedgerError as error:
            log.debug("no ledger to show a round in: %s", error)

    def _settle(self, memory: PlanMemory) -> None:
        """End the moves that rescheduling itself no longer waits for, by what it remembers of them: reports told it,
        or their time was over."""
        waited_for = {entry.migration for entry in memory.in_flight}
        failures = {cool.request_id: cool.failures for cool in memory.cool_downs}

        def settled(move: RoundMove) -> RoundMove:
            if move.migration in waited_for:
                return move
            known = failures.get(move.migration.request_id)
            if known is None:
                return replace(move, outcome=MoveOutcome.GONE, words="nothing was heard of it again")
            if known:
                return replace(move, outcome=MoveOutcome.FAILED, words="no end was told in time")
            return replace(move, outcome=MoveOutcome.MOVED, words="its target reports it")

        self._change(settled)

    def _change(self, change: Callable[[RoundMove], RoundMove]) -> None:
        """Have ``change`` make something of each move under way."""

        def changed(move: RoundMove) -> RoundMove:
            return change(move) if move.outcome is MoveOutcome.UNDER_WAY else move

        self._rounds = tuple(replace(shown, moves=tuple(map(changed, shown.moves))) for shown in self._rounds)


def summary(leader: str, term: int, view: ClusterView, decided: Plan) -> RoundSummary:
    """What is shown of a round."""
    sequences: Counter[str] = Counter()
    for skip in decided.skipped:
        sequences[skip.reason.value] += len(skip.request_ids)
    return RoundSummary(
        leader=leader,
        term=term,
        policy=decided.policy,
        first_s=view.now_s,
        last_s=view.now_s,
        instances=len(view.of_role(Role.DECODE)),
        spread_before_tokens=decided.spread_before_tokens,
        spread_after_tokens=decided.spread_after_tokens,
        planned_moves=len(decided.migrations),
        moves=tuple(RoundMove(migration) for migration in decided.migrations[:MAX_MOVES]),
        skipped_instances=Counter(skip.reason.value for skip in decided.skipped_instances),
        skipped_sequences=sequences,
    )
