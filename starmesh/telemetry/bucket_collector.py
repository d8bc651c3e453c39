"""Histograms that their owners count, beside OpenTelemetry's on the same page. Imported only where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from starmesh.telemetry.bucket_counts import BucketCounts
from starmesh.telemetry.registry.metric import Metric


class BucketCollector(Collector):
    """Asked by the thread of each scrape."""

    def __init__(self, *, labels: Mapping[str, str]) -> None:
        """``labels`` are those of every series."""
        self._labels = dict(labels)
        self._shown: tuple[tuple[Metric, BucketCounts], ...] = ()

    def add(self, row: Metric, counts: BucketCounts) -> None:
        """Show ``counts``, whose bounds are the row's buckets, from now on."""
        self._shown = (*self._shown, (row, counts))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        for row, counts in self._shown:
            in_buckets, total = counts.read()
            bounds = (*map(str, row.buckets), "+Inf")
            buckets = list(zip(bounds, accumulate(in_buckets), strict=True))
            family = HistogramMetricFamily(row.prometheus_name, row.description, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), buckets, total)
            yield family
