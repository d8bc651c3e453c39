"""Simulate and select: the move, or the swap, after which the loads of the instances differ least.

With load S(t) of each instance and a sequence of weight n(t), a move from s to d changes the sum of squared loads by
2 n (n - (S_s - S_d)) at each t; the mean stays, so that is also n times the change of the variance. A move helps iff
that is negative in the sum over t. Owns the comparison; ``round`` keeps the books.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from starmesh.policy.forecast import Integers
from starmesh.policy.rescheduling.measure import Booleans, Floats
from starmesh.policy.rescheduling.outcome import SequenceSkip
from starmesh.policy.rescheduling.round import Round
from starmesh.policy.rescheduling.steps import Classes, amortised, by_request_id, candidates, classify
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
    ready = group.ready[group.owner]
    count = max(1, int(ready.sum()))
    weight = float(group.weights[ready, 0].sum()) / count
    samples = group.weights.shape[1]
    steps = (config.horizon_steps + 1) / samples
    price = config.cost.step_token_s * steps / weight if weight else 0.0
    batch = 2 * count / max(1, int(group.ready.sum()))

    def cost(rows: Integers) -> Floats:
        copying = round_.transfer_s(rows) * config.bystander_slowdown * batch
        seconds: Floats = config.hysteresis * (copying + group.step_s[group.owner[rows]])
        return seconds

    return Worth(price, cost)


class Moves:
    """Every pair of a candidate (rows by request id) and a target (columns by id) with what the move is worth."""

    def __init__(self, round_: Round, worth: Worth, rows: Integers, targets: Integers) -> None:
        self._round = round_
        self._worth = worth
        self.rows = by_request_id(round_, rows)
        self.targets = np.sort(targets)
        self._sources = round_.group.owner[self.rows]
        self._costs = worth.cost(self.rows)
        self._left = np.ones(len(self.rows), dtype=np.bool_)
        self._drops = np.zeros((len(self.rows), len(self.targets)))
        self._fits = np.zeros(self._drops.shape, dtype=np.bool_)
        everyone, everywhere = np.arange(len(self.rows)), np.arange(len(self.targets))
        self._rate(everyone, everywhere)
        self._fit(everywhere)

    def best(self) -> tuple[int, int, float] | None:
        """The row in the group, the target and the drop of the move that is worth most; None if none is worth it."""
        worth = np.where(self._open(), self._net(), -np.inf)
        if worth.size == 0:
            return None
        row, column = np.unravel_index(int(worth.argmax()), worth.shape)
        if not worth[row, column] > 0:
            return None
        return int(self.rows[row]), int(self.targets[column]), float(self._drops[row, column])

    def taken(self, row: int, target: int) -> None:
        """A move was made: rate again what leaves from either end or goes there, and the target's room."""
        self._left &= self.rows != row
        source = self._round.group.owner[row]
        self._rate(np.flatnonzero((self._sources == source) | (self._sources == target)), np.arange(len(self.targets)))
        self._rate(np.arange(len(self.rows)), np.flatnonzero((self.targets == target) | (self.targets == source)))
        self._fit(np.flatnonzero(self.targets == target))

    def explain(self) -> None:
        """Give those that stay their reasons."""
        round_ = self._round
        helps = (self._net() > 0) & (self.targets[None, :] != self._sources[:, None])
        gains, held = helps.any(axis=1), (helps & self._fits).any(axis=1)
        round_.skip(self.rows[self._left & ~gains], SequenceSkip.NO_GAIN)
        round_.skip(self.rows[self._left & ~held], SequenceSkip.NO_ROOM)
        round_.skip(self.rows[self._left], SequenceSkip.BUDGET)

    def _rate(self, rows: Integers, columns: Integers) -> None:
        if len(rows) == 0 or len(columns) == 0:
            return
        round_ = self._round
        weights = round_.group.weights[self.rows[rows]][:, None, :]
        gaps = round_.loads[self._sources[rows]][:, None, :] - round_.loads[self.targets[columns]][None, :, :]
        self._drops[np.ix_(rows, columns)] = -2.0 * (weights * (weights - gaps)).sum(axis=2)

    def _fit(self, columns: Integers) -> None:
        self._fits[:, columns] = self._round.fits(self.rows, self.targets[columns])

    def _net(self) -> Floats:
        net: Floats = self._drops * self._worth.price - self._costs[:, None]
        return net

    def _open(self) -> Booleans:
        """What the budget and the directions of the ends allow, and fits."""
        round_ = self._round
        ends = round_.ends
        source = (ends.sending_slots > 0) & ~ends.receives
        rows = self._left & source[self._sources] & (round_.budget > 0)
        return rows[:, None] & round_.targets()[self.targets][None, :] & self._fits


def level(round_: Round, worth: Worth, most_moves: int) -> None:
    """Make the best moves from overloaded to underloaded instances, one after another, until none is worth it."""
    classes = classify(round_)
    rows = amortised(round_, candidates(round_, classes.overloaded))
    sources, targets = _shortlist(round_, classes)
    if len(targets) == 0:
        round_.skip(rows, SequenceSkip.NO_TARGET)
        return
    listed = np.isin(round_.group.owner[rows], sources)
    moves = Moves(round_, worth, rows[listed], targets)
    for _ in range(most_moves):
        best = moves.best()
        if best is None:
            break
        row, target, drop = best
        round_.move(row, target, balancing(round_), spread_drop(round_, drop))
        moves.taken(row, target)
    moves.explain()
    round_.skip(rows[~listed], SequenceSkip.BUDGET)


def balancing(round_: Round) -> MigrationReason:
    """What a move that balances is for: predicted load as soon as any prediction is believed."""
    return MigrationReason.PREDICTED_LOAD if round_.group.predicted else MigrationReason.LOAD


def _shortlist(round_: Round, classes: Classes) -> tuple[Integers, Integers]:
    most = round_.config.shortlist
    targets = classes.underloaded[round_.targets()[classes.underloaded]]
    ends = round_.ends
    may_send = (ends.sending_slots > 0) & ~ends.receives
    sources = classes.overloaded[may_send[classes.overloaded]]
    return sources[:most], targets[:most]


def spread_drop(round_: Round, drop: float) -> float:
    """By how much the spread shrinks, in tokens, when the sum of squared loads does by ``drop``; called before the
    move. As a quotient: the difference of two roots could round to 0."""
    size = round_.loads[round_.group.ready].size
    before = round_.spread * round_.group.scale
    after = float(np.sqrt(max(before * before - drop / size, 0.0)))
    return drop / size / (before + after) / round_.group.scale
