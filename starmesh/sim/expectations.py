"""What a simulated engine expects of its sequences when it must preempt one.

Owns the way from the predictor to ``EngineCore.expect``. Live, an engine hears of estimates with each load report; here
it asks when it needs them, and gets what a report of this moment would say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from starmesh.engine.engine import EngineCore
from starmesh.sim.events import EventLoop
from starmesh.sim.predictors import SimulatedPredictor


class Expectations(Mapping[str, int]):
    """At how many tokens, prompt and output, each sequence of ``core`` is predicted to end; ``facts_of`` as in
    ``Views``."""

    def __init__(
        self,
        loop: EventLoop,
        core: EngineCore,
        predictor: SimulatedPredictor,
        *,
        facts_of: Callable[[str], tuple[int, int, int]],
    ) -> None:
        self._loop = loop
        self._core = core
        self._predictor = predictor
        self._facts_of = facts_of
        self._as_of_s = -1.0
        self._expected: dict[str, int] = {}

    def __getitem__(self, request_id: str) -> int:
        return self._now()[request_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def _now(self) -> dict[str, int]:
        # Of one moment the scheduler asks for every sequence.
        if self._as_of_s != self._loop.now_s:
            self._as_of_s = self._loop.now_s
            self._expected = self._predict()
        return self._expected

    def _predict(self) -> dict[str, int]:
        sequences = self._core.scheduler.sequences.values()
        if not sequences:
            return {}
        keys, totals, limits = np.array([self._facts_of(each.request_id) for each in sequences], dtype=np.int64).T
        output, tokens = np.array([(each.output_tokens, each.tokens) for each in sequences], dtype=np.int64).T
        median, _, _ = self._predictor.remaining(keys, output, totals, limits)
        return dict(zip([each.request_id for each in sequences], (tokens + median).tolist(), strict=True))
