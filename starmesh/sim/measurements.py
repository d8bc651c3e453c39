"""Measures a run while it goes on, in memory that does not grow with the number of requests.

Owns what is counted, and which requests are measured: those that arrive between ``warm_up_s`` and ``measure_until_s``.
Owns no words for people (``report``).
"""

from __future__ import annotations

import hashlib
import math
import platform
import struct
from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from starmesh.migration.terms import Cause
from starmesh.sim.code_version import code_version
from starmesh.sim.config import SimulationConfig
from starmesh.sim.histogram import LogHistogram
from starmesh.sim.outcome import RequestOutcome
from starmesh.sim.result import (
    MOVED,
    Execution,
    Goodput,
    LengthHistogram,
    MigrationCount,
    MigrationSummary,
    RequestCounts,
    SimulationResult,
)
from starmesh.sim.series import SeriesRecorder
from starmesh.types import InstanceLoad, Migration, MigrationReason

_LENGTH_BIN = 2**0.25 - 1
_LONGEST_OUTPUT = 1e7
_SAMPLES_PER_POINT = 4
_FIRST_SAMPLE_S = 1.0


class Measurements:
    """Is told what happens; ``result`` says what came of it."""

    def __init__(self, config: SimulationConfig) -> None:
        self._config = config
        self._ttft, self._tpot, self._end_to_end, self._longest_gap = (LogHistogram() for _ in range(4))
        self._itl, self._duration, self._stood_still = (LogHistogram() for _ in range(3))
        self._lengths = LogHistogram(least=1.0, most=_LONGEST_OUTPUT, width=_LENGTH_BIN)
        self._good = [0] * len(config.slos)
        self._requests: Counter[str] = Counter()
        self._migrations: Counter[tuple[MigrationReason, str]] = Counter()
        self._moved = self._size_bytes = self._wasted_bytes = self._preemptions = 0
        self._until_s = math.inf if config.measure_until_s is None else config.measure_until_s
        self._last_arrival_s = config.warm_up_s
        self._simulated_tokens = 0
        self._series = SeriesRecorder(instances=config.decode_instances)
        self._digest = hashlib.blake2b(digest_size=16)

    def finished(self, outcome: RequestOutcome) -> None:
        """Count a request that nothing more will happen to: finished, refused, or unfinished when the run ends."""
        self._digest.update(_record(outcome))
        requests = self._requests
        requests["arrived"] += 1
        self._simulated_tokens += outcome.output_tokens
        self._last_arrival_s = max(self._last_arrival_s, outcome.arrived_s)
        if not self._config.warm_up_s <= outcome.arrived_s <= self._until_s:
            return
        requests["measured"] += 1
        requests["prompt_tokens"] += outcome.prompt_tokens
        requests["preemptions"] += outcome.preemptions
        requests["migrations"] += outcome.migrations
        requests["recoveries"] += outcome.recoveries
        if outcome.refused or outcome.finished_s is None:
            requests["refused" if outcome.refused else "unfinished"] += 1
            return
        requests["finished"] += 1
        requests["cut"] += outcome.cut
        requests["output_tokens"] += outcome.output_tokens
        ttft_s, tpot_s = outcome.ttft_s, outcome.tpot_s
        self._ttft.add(ttft_s)
        self._tpot.add(tpot_s)
        self._end_to_end.add(outcome.finished_s - outcome.arrived_s)
        self._longest_gap.add(outcome.longest_gap_s)
        self._lengths.add(outcome.output_tokens)
        for place, slo in enumerate(self._config.slos):
            self._good[place] += ttft_s <= slo.ttft_s and tpot_s <= slo.tpot_s

    def gaps(self, gaps_s: npt.NDArray[np.float64], sequences: int) -> None:
        """Count gaps [n] between tokens that each of ``sequences`` sequences had."""
        self._itl.add_all(gaps_s, sequences)

    def gap(self, gap_s: float) -> None:
        """Count one gap between two tokens of one sequence."""
        self._itl.add(gap_s)

    def preempted(self, count: int) -> None:
        """Count sequences that lost their KV for want of blocks and start over."""
        self._preemptions += count

    def migration_ended(
        self,
        migration: Migration,
        *,
        moved: bool,
        cause: Cause | None,
        duration_s: float,
        size_bytes: int,
        stood_still_s: float,
    ) -> None:
        """Count a migration. ``cause`` says why it did not move its sequence; ``size_bytes`` travelled in any case."""
        outcome = MOVED if moved else cause.value if cause else "unknown"
        self._migrations[migration.reason, outcome] += 1
        if not moved:
            self._wasted_bytes += size_bytes
            return
        self._moved += 1
        self._size_bytes += size_bytes
        self._duration.add(duration_s)
        self._stood_still.add(stood_still_s)

    @property
    def sample_interval_s(self) -> float:
        """How often ``sample`` is worth calling now: the points of a long run stand for longer times."""
        return max(_FIRST_SAMPLE_S, self._series.resolution_s / _SAMPLES_PER_POINT)

    def sample(self, now_s: float, loads: Mapping[str, InstanceLoad]) -> None:
        """Look at the decode instances, by id; those alone: the spread is over them."""
        self._series.sample(now_s, loads, preemptions=self._preemptions, migrations=self._moved)

    def result(self, *, ended_at_s: float, wall_s: float, recomputed_tokens: int | None = None) -> SimulationResult:
        """What came of the run, which ended at ``ended_at_s`` of virtual time after ``wall_s`` of the machine's."""
        requests = self._requests
        warm_up_s = self._config.warm_up_s
        until_s = min(self._until_s, self._last_arrival_s)
        measured_s = until_s - warm_up_s
        measured = requests["measured"]
        return SimulationResult(
            config=self._config,
            code_version=code_version(),
            trace_digest=self._digest.hexdigest(),
            duration_s=ended_at_s,
            measured_s=measured_s,
            requests=RequestCounts(
                arrived=requests["arrived"],
                measured=measured,
                finished=requests["finished"],
                refused=requests["refused"],
                unfinished=requests["unfinished"],
                cut=requests["cut"],
                prompt_tokens=requests["prompt_tokens"],
                output_tokens=requests["output_tokens"],
                preemptions=requests["preemptions"],
                migrations=requests["migrations"],
                recoveries=requests["recoveries"],
            ),
            goodput=tuple(
                Goodput(
                    slo=slo,
                    good=good,
                    share=good / measured if measured else 0.0,
                    per_s=good / measured_s if measured_s > 0 else 0.0,
                )
                for slo, good in zip(self._config.slos, self._good, strict=True)
            ),
            ttft=self._ttft.distribution(),
            tpot=self._tpot.distribution(),
            itl=self._itl.distribution(),
            end_to_end=self._end_to_end.distribution(),
            longest_gap=self._longest_gap.distribution(),
            output_lengths=self._length_histogram(),
            preemptions=self._preemptions,
            recomputed_tokens=recomputed_tokens,
            migrations=MigrationSummary(
                counts=tuple(
                    MigrationCount(reason=reason, outcome=outcome, count=count)
                    for (reason, outcome), count in sorted(
                        self._migrations.items(), key=lambda item: (item[0][0].value, item[0][1])
                    )
                ),
                size_bytes=self._size_bytes,
                wasted_bytes=self._wasted_bytes,
                duration=self._duration.distribution(),
                stood_still=self._stood_still.distribution(),
            ),
            spread=self._series.spread(since_s=warm_up_s, until_s=until_s),
            series=self._series.series(),
            execution=Execution(
                wall_s=wall_s,
                simulated_tokens=self._simulated_tokens,
                machine=platform.machine(),
                python=platform.python_version(),
                numpy=np.__version__,
            ),
        )

    def _length_histogram(self) -> LengthHistogram:
        counts = self._lengths.counts[1:-1]
        (used,) = np.nonzero(counts)
        if not len(used):
            return LengthHistogram(edges=(), counts=())
        first, last = int(used[0]), int(used[-1])
        return LengthHistogram(
            edges=tuple(self._lengths.edges[first : last + 2].tolist()), counts=tuple(counts[first : last + 1].tolist())
        )


def _record(outcome: RequestOutcome) -> bytes:
    """All of an outcome, to the last bit."""
    times = (outcome.placed_s, outcome.first_token_s, outcome.finished_s)
    request_id = outcome.request_id.encode()
    return request_id + struct.pack(
        "<Q5d5q??",
        len(request_id),
        outcome.arrived_s,
        outcome.longest_gap_s,
        *(math.nan if time_s is None else time_s for time_s in times),
        outcome.prompt_tokens,
        outcome.output_tokens,
        outcome.migrations,
        outcome.preemptions,
        outcome.recoveries,
        outcome.refused,
        outcome.cut,
    )
