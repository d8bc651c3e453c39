"""Joins the estimates of a request with its end.

Owns what is remembered of requests in flight and its bounds: the oldest are forgotten. Owns nothing that is learned
from an outcome. Pure.

Ends come more than once when a call that carried them failed on its way back; only the first counts.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from services.predictor.intake import End
from services.predictor.registry import Version
from starmesh.prediction.batch import Floats, Integers

MAX_REQUESTS: Final = 8192
MAX_ESTIMATES: Final = 512
"""Of one request: 10,240 tokens at one every 20. Of a longer one every second is kept, then every fourth, and so on."""

MAX_HELD: Final = 1 << 19
"""Estimates of all requests: some 120 MiB. As many requests as may be remembered hold them with 1,280 tokens each."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request that has ended, and what its estimates were. Columns are in the order of ``positions``, [n]:
    ``predicted`` [n, 2] is what ``version`` said, ``answered`` [n, 2] the same corrected. n may be 0, of no version."""

    request_id: str
    output_tokens: int
    finished: bool
    version: Version | None
    positions: Integers
    predicted: Floats
    answered: Floats


@dataclass(slots=True)
class _Estimated:
    version: Version
    prompt_tokens: int
    noted: int = 0
    every: int = 1
    by_position: dict[int, tuple[float, float, float, float]] = field(default_factory=dict)


class Outcomes:
    """Estimates by request."""

    def __init__(
        self, *, max_requests: int = MAX_REQUESTS, max_estimates: int = MAX_ESTIMATES, max_held: int = MAX_HELD
    ) -> None:
        self._max_requests = max_requests
        self._max_estimates = max_estimates
        self._max_held = max_held
        self._held = 0
        self._running: OrderedDict[str, _Estimated] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._running)

    def note(
        self,
        request_id: str,
        version: Version,
        *,
        prompt_tokens: int,
        position: int,
        predicted: tuple[float, float],
        answered: tuple[float, float],
    ) -> None:
        """Remember an estimate. It replaces those at its position and later: such are of an instance that died and
        whose tokens nobody has. Another version, or another prompt under the same name, begins anew."""
        known = self._running.get(request_id)
        if known is None or known.version is not version or known.prompt_tokens != prompt_tokens:
            self._forget(request_id)
            known = self._running[request_id] = _Estimated(version, prompt_tokens)
            self._ended.pop(request_id, None)
        self._running.move_to_end(request_id)
        estimates = known.by_position
        self._held -= len(estimates)
        while estimates and next(reversed(estimates)) >= position:
            estimates.popitem()
        if len(estimates) >= self._max_estimates:
            known.by_position = estimates = dict(list(estimates.items())[::2])
            known.every *= 2
        if known.noted % known.every == 0:
            estimates[position] = (*predicted, *answered)
        known.noted += 1
        self._held += len(estimates)
        while len(self._running) > self._max_requests or self._held > self._max_held:
            self._forget(next(iter(self._running)))

    def end(self, end: End) -> Outcome | None:
        """What came of a request; None when that is known already."""
        known = self._forget(end.request_id)
        if end.request_id in self._ended:
            return None
        self._ended[end.request_id] = None
        if len(self._ended) > self._max_requests:
            self._ended.popitem(last=False)
        estimates = known.by_position if known is not None else {}
        rows = [(position, *numbers) for position, numbers in estimates.items() if position <= end.output_tokens]
        columns = np.array(rows, dtype=np.float64).reshape(len(rows), 5)
        return Outcome(
            request_id=end.request_id,
            output_tokens=end.output_tokens,
            finished=end.finished,
            version=known.version if known is not None else None,
            positions=columns[:, 0].astype(np.int64),
            predicted=columns[:, 1:3].astype(np.float32),
            answered=columns[:, 3:5].astype(np.float32),
        )

    def _forget(self, request_id: str) -> _Estimated | None:
        known = self._running.pop(request_id, None)
        if known is not None:
            self._held -= len(known.by_position)
        return known
