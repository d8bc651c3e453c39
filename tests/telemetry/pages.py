"""Pages with metrics, read as Prometheus reads them."""

from __future__ import annotations

import re
import urllib.request
from collections import defaultdict
from dataclasses import dataclass, field

from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

_URL = re.compile(r"metrics at (http://\S+)")
# Not of a metric's own: which process, and which bucket.
COMMON_LABELS = {"service_instance_id", "le"}


def page_url(log: str) -> str:
    """Where a service says that its page is."""
    found = _URL.search(log)
    assert found is not None, f"no page in the log:\n{log}"
    return found[1]


def scrape(url: str) -> str:
    """The page."""
    with urllib.request.urlopen(url, timeout=20) as page:
        return str(page.read().decode())


@dataclass
class Seen:
    """What pages of one role have shown so far, by the name that Prometheus gives a metric."""

    types: dict[str, str] = field(default_factory=dict)
    labels: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    values: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, page: str) -> None:
        """Take a page in."""
        for family in text_string_to_metric_families(page):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            self.types[name] = family.type
            self._add_samples(name, family)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all samples of that name on all pages that have these labels."""
        return sum(
            value for found, value in self.values[name] if all(found.get(key) == text for key, text in labels.items())
        )

    def _add_samples(self, name: str, family: Family) -> None:
        for sample in family.samples:
            self.labels[name] |= {label for label, value in sample.labels.items() if value} - COMMON_LABELS
            self.values[sample.name].append((sample.labels, sample.value))
