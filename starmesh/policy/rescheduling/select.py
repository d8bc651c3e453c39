"""Simulate and select: the move after which the loads of the instances differ least.

With load S(t) of each instance and a sequence of weight n(t), a move from s to d changes the sum of squared loads by
2 n (n - (S_s - S_d)) at each t; the mean stays, so that is also n times the change of the variance. A move helps iff
that is negative in the sum over t. Owns the comparison; ``round`` keeps the books.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from starmesh.policy.forecast import Integers
from starmesh.policy.rescheduling.measure import Floats
from starmesh.policy.rescheduling.outcome import SequenceSkip
from starmesh.policy.rescheduling.round import Mover, Round
from starmesh.policy.rescheduling.sequences import Booleans
from starmesh.policy.rescheduling.steps import amortised, candidates, classify
from starmesh.types import MigrationReason


@dataclass(frozen=True, slots=True)
class Worth:
    """How a drop of the sum of squared loads is weighed against moving: worth is ``price`` times the drop minus
    ``cost(rows)``. A move must be worth more than 0."""

    price: float
    cost: Callable[[Integers], Floats]


def at_any_cost(round_: Round) -> Worth:
    """Any drop is worth it: STAR filters by amortisation alone."""
    return Worth(1.0, lambda rows: np.zeros(len(rows)))


def in_sequence_seconds(round_: Round) -> Worth:
    """What the sequences of the cluster wait less over the horizon, against what they wait for the migration.

    Each token makes a step of its instance longer by ``step_token_s`` for each sequence there. With s tokens to a
    sequence on average, S resident tokens are S / s sequences that wait S * step_token_s in each step: the sum of
    squared loads times step_token_s / s, over the horizon. A migration slows the batches of both ends while it copies,
    and the sequence itself misses about one step.
    """
    group, config = round_.group, round_.config
    counts = np.diff(group.sequences.first_row)[group.ready]
    count = max(1, int(counts.sum()))
    weight = int((group.loads[:, 0] - group.scale * group.reserved)[group.ready].sum()) / count
    steps = (config.horizon_steps + 1) / group.loads.shape[1]
    price = config.cost.step_token_s * steps / weight if weight else 0.0
    batch = 2 * count / max(1, len(counts))

    def cost(rows: Integers) -> Floats:
        copying = round_.transfer_s(rows) * config.bystander_slowdown * batch
        seconds: Floats = config.hysteresis * (copying + group.step_s[group.sequences.owner[rows]])
        return seconds

    return Worth(price, cost)


class Moves:
    """Every pair of a target and a candidate with what the move is worth, [targets, rows].

    The drop of the sum of squared loads is 2 (n S_s - n n - n S_d), summed over t: the first two for each row, the last
    for each pair. In whole numbers, where sums and differences beyond 64 bits come out right if the drop fits. A move
    changes its two ends, so only their parts are rated again: rows of one source lie together.
    """

    def __init__(self, round_: Round, worth: Worth, rows: Integers, targets: Integers) -> None:
        """``rows`` one source after the other."""
        group = round_.group
        self._round = round_
        self._price = 2 * worth.price
        self._rows = rows
        self._targets = targets
        self._columns = {target: column for column, target in enumerate(targets.tolist())}
        self._sources = group.sequences.owner[rows]
        edges = [*np.flatnonzero(np.diff(self._sources, prepend=-1)).tolist(), len(rows)]
        self._spans = {int(self._sources[begin]): slice(begin, end) for begin, end in pairwise(edges)}
        self._costs = worth.cost(rows)
        # By sample and by bin: sums and comparisons run along the rows.
        self._weights = np.ascontiguousarray(group.weights(rows).T)
        self._peaks = np.ascontiguousarray(group.peaks(rows).T)
        self._holds_whole = np.ascontiguousarray(round_.holds_whole(rows, targets).T)
        self._left = np.ones(len(rows), dtype=np.bool_)
        self._leaves = round_.senders()[self._sources]
        self._enters = round_.targets()[targets]
        self._gains = np.empty((len(targets), len(rows)))
        """The worth of a move that is allowed and fits, or -inf."""
        self._look()
        self._rate(slice(None), slice(None))

    def best(self) -> tuple[Mover, int, int] | None:
        """The sequence, the target and the drop of the move that is worth most, of equals that of the lowest request
        id and then target id; None if none is worth it."""
        most = self._gains.max(initial=0.0)
        if most <= 0 or self._round.budget <= 0:
            return None
        found = [divmod(at, len(self._rows)) for at in np.flatnonzero(self._gains == most).tolist()]
        name = self._round.group.sequences.name
        column, row = min(found, key=lambda at: (name(self._rows[at[1]]), self._targets[at[0]]))
        drop = 2 * (int(self._leaving[row]) - int(self._entering[column, row]))
        mover = Mover(int(self._rows[row]), self._weights[:, row], self._peaks[:, row])
        return mover, int(self._targets[column]), drop

    def taken(self, row: int, target: int) -> None:
        """A move was made: rate its ends again, or close them."""
        round_ = self._round
        moved = self._rows == row
        self._left &= ~moved
        self._leaves &= ~moved
        for end in (int(round_.group.sequences.owner[row]), target):
            if end in self._spans:
                span = self._spans[end]
                if round_.may_send(end):
                    self._leaving[span] = self._leave(span)
                    self._rate(slice(None), span)
                else:
                    self._leaves[span] = False
                    self._gains[:, span] = -np.inf
            if end in self._columns:
                column = slice(self._columns[end], self._columns[end] + 1)
                if round_.may_receive(end):
                    self._entering[column], self._fits[column] = self._enter(column)
                    self._rate(column, slice(None))
                else:
                    self._enters[column] = False
                    self._gains[column] = -np.inf

    def explain(self) -> None:
        """Give those that stay their reasons."""
        self._look()
        round_, stay = self._round, self._left
        helps = ((self._leaving - self._entering) * self._price > self._costs) & (
            self._sources != self._targets[:, None]
        )
        round_.skip(self._rows[stay & ~helps.any(axis=0)], SequenceSkip.NO_GAIN)
        round_.skip(self._rows[stay & ~(helps & self._fits).any(axis=0)], SequenceSkip.NO_ROOM)
        round_.skip(self._rows[stay], SequenceSkip.BUDGET)

    def _look(self) -> None:
        """Take over the loads and the room of all."""
        self._leaving = self._leave(slice(None))
        self._entering, self._fits = self._enter(slice(None))

    def _leave(self, span: slice) -> Integers:
        weights = self._weights[:, span]
        leaving: Integers = (weights * (self._round.loads[self._sources[span]].T - weights)).sum(axis=0)
        return leaving

    def _enter(self, columns: slice) -> tuple[Integers, Booleans]:
        targets = self._targets[columns]
        has_room = (self._peaks[:, None, :] <= self._round.room(targets).T[:, :, None]).all(axis=0)
        # Of whole numbers einsum makes products faster than matmul does.
        entering: Integers = np.einsum("ts,sr->tr", self._round.loads[targets], self._weights)
        return entering, has_room & self._holds_whole[columns]

    def _rate(self, columns: slice, rows: slice) -> None:
        open_ = self._fits[columns, rows] & self._leaves[rows] & self._enters[columns, None]
        worth = (self._leaving[rows] - self._entering[columns, rows]) * self._price - self._costs[rows]
        self._gains[columns, rows] = np.where(open_, worth, -np.inf)


def level(round_: Round, worth: Worth, most_moves: int) -> None:
    """Make the best moves from overloaded to underloaded instances, one after another, until none is worth it."""
    classes = classify(round_)
    rows = amortised(round_, candidates(round_, classes.overloaded))
    most = round_.config.shortlist
    targets = classes.underloaded[round_.targets()[classes.underloaded]][:most]
    if len(targets) == 0:
        round_.skip(rows, SequenceSkip.NO_TARGET)
        return
    listed = np.zeros(len(round_.loads), dtype=np.bool_)
    listed[classes.overloaded[round_.senders()[classes.overloaded]][:most]] = True
    here = listed[round_.group.sequences.owner[rows]]
    moves = Moves(round_, worth, rows[here], targets)
    reason = MigrationReason.PREDICTED_LOAD if round_.group.predicted else MigrationReason.LOAD
    size = round_.loads[round_.group.ready].size
    variance = (round_.spread * round_.group.scale) ** 2
    for _ in range(most_moves):
        best = moves.best()
        if best is None:
            break
        mover, target, drop = best
        left = max(variance - drop / size, 0.0)
        # As a quotient: the difference of two roots could round to 0.
        gain = drop / size / (math.sqrt(variance) + math.sqrt(left)) / round_.group.scale
        round_.move(mover, target, reason, gain)
        moves.taken(mover.row, target)
        variance = left
    moves.explain()
    round_.skip(rows[~here], SequenceSkip.BUDGET)
