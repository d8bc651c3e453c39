"""The sequences of a group of instances as arrays, in the reports' order, on which nothing may depend.

Owns what is read of a report. Owns no belief and no weight (``starmesh.policy.forecast``), and no choice.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from itertools import chain

import numpy as np
import numpy.typing as npt

from starmesh.policy.forecast import Integers, believe
from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.sequence_loads import UNKNOWN, SequenceLoads
from starmesh.types import InstanceLoad

Booleans = npt.NDArray[np.bool_]


class Foresight(Enum):
    """How far a policy looks when it compares loads."""

    NOW = "now"
    """Tokens held now; predictions are not used."""
    MEAN = "mean"
    """The mean over the horizon: STAR's load over time as one number."""
    RESOLVED = "resolved"
    """Each of several points of the horizon, and a sequence's own share of a step beside its tokens'. What must end
    within the horizon does, predicted or not."""


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """The sequences of a group, arrays [sequences].

    ``owner`` is the row of the instance that reports it, ``first_row`` [instances + 1] delimits the instances' rows,
    ``names`` [instances] are their request ids: most are never asked for. ``tokens`` are prompt and output, ``limit``
    is what it may still generate at most. ``remaining`` is UNKNOWN without a believed prediction, but the limit where
    that is foreseen; ``upper`` always bounds it: without a prediction the limit does, since memory must hold whatever
    may come.
    """

    names: list[tuple[str, ...]]
    first_row: Integers
    owner: Integers
    epochs: Integers
    tokens: Integers
    resident: Integers
    decoding: Booleans
    remaining: Integers
    upper: Integers
    limit: Integers

    def name(self, row: int) -> str:
        """The request id of a row."""
        owner = int(self.owner[row])
        return self.names[owner][row - int(self.first_row[owner])]

    def rows_named(self, names: Collection[str]) -> list[int]:
        """The rows of these requests; one that moves may be reported at both ends."""
        every = chain.from_iterable(self.names) if names else ()
        return [row for row, name in enumerate(every) if name in names]

    def of(self, instances: Integers) -> tuple[Integers, Integers]:
        """The rows that these report, one instance after the other, and where in that each one's begin."""
        counts = np.diff(self.first_row)[instances]
        begins = np.cumsum(counts) - counts
        return np.arange(counts.sum()) + np.repeat(self.first_row[instances] - begins, counts), begins


def read_sequences(
    loads: list[InstanceLoad], longest: Integers, config: ReschedulingConfig, foresight: Foresight
) -> Sequences:
    """The sequences of these loads; ``longest`` [instances] is how long each instance lets one become."""
    reports = [SequenceLoads.of(load.sequences) for load in loads]
    columns = zip(*[report.columns for report in reports], strict=True)
    epochs, prompt, output, resident, most, median, quantile, age = (
        np.frombuffer(b"".join(column), dtype=np.int64) for column in columns
    )
    counts = np.array([len(report) for report in reports], dtype=np.int64)
    owner = np.repeat(np.arange(len(loads)), counts)
    tokens = prompt + output
    limit = np.minimum(most - output, longest[owner] - tokens).clip(min=0)
    remaining, upper = np.full(len(tokens), UNKNOWN), limit
    if foresight is not Foresight.NOW:
        remaining, upper = believe(median, quantile, age, limit, max_age_tokens=config.max_prediction_age_tokens)
    if foresight is Foresight.RESOLVED:
        # That it ends by then is certain, and nearer the truth than that it stays.
        remaining = np.where((remaining == UNKNOWN) & (limit <= config.horizon_steps), limit, remaining)
    return Sequences(
        names=[report.request_ids for report in reports],
        first_row=np.concatenate(([0], np.cumsum(counts))),
        owner=owner,
        epochs=epochs,
        tokens=tokens,
        resident=resident,
        # All but the last token, which the next step computes.
        decoding=(output > 0) & (resident >= tokens - 1),
        remaining=remaining,
        upper=upper,
        limit=limit,
    )
