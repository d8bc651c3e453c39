"""What was seen of the decode instances over time, in bounded memory: when there is no room, two points become one.

Owns the points and the spread of load over the instances. Owns no sampling in time: whoever runs the cluster looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from starmesh.types import InstanceLoad

_FIRST_RESOLUTION_S = 1.0
_MOST_VALUES = 32_768
_POINTS = (96, 480)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSeries:
    """Point i stands for the time from i to i + 1 times ``resolution_s``; None where nothing was seen.

    By instance in the order of ``instance_ids``, then by point: the means of ``resident_tokens`` and
    ``running_sequences``, the greatest ``kv_use`` (the part of its blocks that are in use). By point: the means of
    ``variation`` (coefficient of variation of resident tokens over the instances), ``max_over_mean`` (of the same) and
    ``waiting_sequences`` (on all instances), and ``preemptions`` and ``migrations`` since the start.
    """

    resolution_s: float
    instance_ids: tuple[str, ...]
    resident_tokens: tuple[tuple[float | None, ...], ...]
    running_sequences: tuple[tuple[float | None, ...], ...]
    kv_use: tuple[tuple[float | None, ...], ...]
    variation: tuple[float | None, ...]
    max_over_mean: tuple[float | None, ...]
    waiting_sequences: tuple[float | None, ...]
    preemptions: tuple[float | None, ...]
    migrations: tuple[float | None, ...]

    @property
    def points(self) -> int:
        """How many points there are."""
        return len(self.variation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How unevenly resident tokens lay on the decode instances, and how full these were, over the measured time.

    Means over time of the coefficient of variation and of the largest over the mean; the mean and greatest KV use of an
    instance. NaN never: 0 where nothing was seen.
    """

    variation: float = 0.0
    max_over_mean: float = 0.0
    kv_use_mean: float = 0.0
    kv_use_most: float = 0.0


class SeriesRecorder:
    """Collects samples into points."""

    def __init__(self, *, instances: int) -> None:
        self._capacity = 2 * (min(max(_MOST_VALUES // max(instances, 1), _POINTS[0]), _POINTS[1]) // 2)
        self.resolution_s = _FIRST_RESOLUTION_S
        """How long a time one point stands for."""
        self._columns: dict[str, int] = {}
        self._last_ids: tuple[str, ...] = ()
        self._last_columns: npt.NDArray[np.intp] = np.empty(0, np.intp)
        # [points, instances], of them [..., 3]: resident tokens, running sequences, KV use.
        self._sums = np.zeros((self._capacity, 0, 3))
        self._kv_most = np.zeros((self._capacity, 0))
        self._seen = np.zeros((self._capacity, 0))
        # [points, 3]: variation, largest over mean, both where anything is resident, and waiting sequences.
        self._cluster = np.zeros((self._capacity, 3))
        self._cluster_seen = np.zeros((self._capacity, 2))
        # [points, 2]: preemptions and migrations so far.
        self._so_far = np.zeros((self._capacity, 2))

    def sample(self, now_s: float, loads: Mapping[str, InstanceLoad], *, preemptions: int, migrations: int) -> None:
        """Add what the instances are like at ``now_s``, and what was counted until then."""
        if not loads:
            return
        point = int(now_s // self.resolution_s)
        while point >= self._capacity:
            self._halve()
            point = int(now_s // self.resolution_s)
        columns = self._columns_of(tuple(loads))
        values = np.array(
            [
                (load.resident_tokens, load.running_sequences, 1.0 - load.free_blocks / load.total_blocks)
                for load in loads.values()
            ],
            np.float64,
        )
        self._sums[point, columns] += values
        self._kv_most[point, columns] = np.maximum(self._kv_most[point, columns], values[:, 2])
        self._seen[point, columns] += 1
        resident = values[:, 0]
        mean = float(resident.mean())
        if mean > 0:
            self._cluster[point, :2] += (float(resident.std()) / mean, float(resident.max()) / mean)
            self._cluster_seen[point, 0] += 1
        self._cluster[point, 2] += sum(load.waiting_sequences for load in loads.values())
        self._cluster_seen[point, 1] += 1
        self._so_far[point] = (preemptions, migrations)

    def spread(self, *, since_s: float, until_s: float) -> Spread:
        """Over the points that lie in this time, the first and last of them included."""
        points = slice(int(since_s // self.resolution_s), int(until_s // self.resolution_s) + 1)
        busy = float(self._cluster_seen[points, 0].sum())
        seen = float(self._seen[points].sum())
        variation, max_over_mean = (self._cluster[points, :2].sum(axis=0) / max(busy, 1.0)).tolist()
        return Spread(
            variation=variation,
            max_over_mean=max_over_mean,
            kv_use_mean=float(self._sums[points, :, 2].sum()) / max(seen, 1.0),
            kv_use_most=float(self._kv_most[points].max(initial=0.0)),
        )

    def series(self) -> TimeSeries:
        """All points until the last one that has anything."""
        (used,) = np.nonzero(self._cluster_seen[:, 1])
        end = int(used[-1]) + 1 if len(used) else 0
        seen = self._seen[:end]
        busy, looked = self._cluster_seen[:end].T
        return TimeSeries(
            resolution_s=self.resolution_s,
            instance_ids=tuple(self._columns),
            resident_tokens=_by_instance(self._sums[:end, :, 0], seen, digits=0),
            running_sequences=_by_instance(self._sums[:end, :, 1], seen, digits=1),
            kv_use=_by_instance(self._kv_most[:end] * seen, seen, digits=4),
            variation=_means(self._cluster[:end, 0], busy, digits=4),
            max_over_mean=_means(self._cluster[:end, 1], busy, digits=4),
            waiting_sequences=_means(self._cluster[:end, 2], looked, digits=1),
            preemptions=_means(self._so_far[:end, 0] * looked, looked, digits=0),
            migrations=_means(self._so_far[:end, 1] * looked, looked, digits=0),
        )

    def _columns_of(self, instance_ids: tuple[str, ...]) -> npt.NDArray[np.intp]:
        if instance_ids != self._last_ids:
            for instance_id in instance_ids:
                self._columns.setdefault(instance_id, len(self._columns))
            more = len(self._columns) - self._seen.shape[1]
            if more:
                self._sums = np.pad(self._sums, ((0, 0), (0, more), (0, 0)))
                self._kv_most = np.pad(self._kv_most, ((0, 0), (0, more)))
                self._seen = np.pad(self._seen, ((0, 0), (0, more)))
            self._last_ids = instance_ids
            self._last_columns = np.array([self._columns[name] for name in instance_ids], np.intp)
        return self._last_columns

    def _halve(self) -> None:
        """Make one point of two, twice as long."""
        self.resolution_s *= 2
        half = self._capacity // 2
        for summed in (self._sums, self._seen, self._cluster, self._cluster_seen):
            summed[:half] = summed[0::2] + summed[1::2]
            summed[half:] = 0
        for highest in (self._kv_most, self._so_far):
            highest[:half] = np.maximum(highest[0::2], highest[1::2])
            highest[half:] = 0


def _by_instance(sums: Floats, seen: Floats, *, digits: int) -> tuple[tuple[float | None, ...], ...]:
    return tuple(_means(sums[:, column], seen[:, column], digits=digits) for column in range(sums.shape[1]))


def _means(sums: Floats, seen: Floats, *, digits: int) -> tuple[float | None, ...]:
    means = np.round(sums / np.maximum(seen, 1.0), digits).tolist()
    return tuple(mean if count else None for mean, count in zip(means, seen.tolist(), strict=True))
