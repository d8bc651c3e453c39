"""Panels, and the queries that rows of the registry make.

Owns PromQL. Names, units and descriptions are the registry's (``starmesh.telemetry.registry``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from starmesh.telemetry.registry.metric import Metric

INSTANCE: Final = "service_instance_id"
_UNITS: Final = {"s": "s", "By": "bytes", "1": "percentunit"}
_SUMS: Final = ("_sum", "_count")


@dataclass(frozen=True, slots=True)
class Curve:
    """One query of a panel. ``legend`` may name labels in double braces."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """A graph over time."""

    title: str
    unit: str
    description: str
    curves: tuple[Curve, ...]
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Dashboard:
    """``rows`` are titled groups of panels; ``chosen``: with a choice of instances."""

    uid: str
    title: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]
    chosen: bool = False


def level(row: Metric, by: Sequence[str] = (), where: str = "", *, title: str = "", how: str = "sum") -> Panel:
    """A gauge as it is; what ``by`` does not name is added up, or averaged (``how``: "avg")."""
    return Panel(title or row.name, _unit(row), row.description, (_gathered(_select(row, where), by, how),))


def rate(row: Metric, by: Sequence[str] = (), where: str = "", *, title: str = "") -> Panel:
    """A counter's increase a second."""
    unit = "Bps" if row.unit == "By" else "short"
    expr = f"rate({_select(row, where)}[$__rate_interval])"
    return Panel(title or f"{row.name} per second", unit, row.description, (_gathered(expr, by, "sum"),), stacked=True)


def quantiles(row: Metric, parts: Sequence[float] = (0.5, 0.9, 0.99), where: str = "", *, title: str = "") -> Panel:
    """Quantiles of a histogram over all that show it."""
    curves = tuple(Curve(_quantile(row, part, (), where), f"P{part * 100:g}") for part in parts)
    return Panel(title or row.name, _unit(row), row.description, curves)


def quantile(row: Metric, part: float, by: Sequence[str], where: str = "", *, title: str = "") -> Panel:
    """One quantile, by some labels."""
    curve = Curve(_quantile(row, part, by, where), _legend(by))
    return Panel(title or f"P{part * 100:g} of {row.name}", _unit(row), row.description, (curve,))


def mean(row: Metric, by: Sequence[str], where: str = "", *, title: str = "") -> Panel:
    """The mean of a histogram, by some labels."""
    total, count = (f"sum by ({', '.join(by)}) (rate({_select(row, where, part)}[$__rate_interval]))" for part in _SUMS)
    return Panel(title or f"mean {row.name}", _unit(row), row.description, (Curve(f"{total} / {count}", _legend(by)),))


def part(title: str, row: Metric, whole: Metric, by: Sequence[str], where: str = "", *, wanted: str = "") -> Panel:
    """A gauge, or the rate of a counter, as a part of another; ``wanted`` limits the numerator further."""
    several = ", ".join(filter(None, (where, wanted)))
    upper, lower = _select(row, several), _select(whole, where)
    if row.prometheus_type == "counter":
        upper, lower = (f"rate({expr}[$__rate_interval])" for expr in (upper, lower))
    group = f"sum by ({', '.join(by)})" if by else "sum"
    return Panel(title, "percentunit", row.description, (Curve(f"{group} ({upper}) / {group} ({lower})", _legend(by)),))


def _unit(row: Metric) -> str:
    return _UNITS.get(row.unit, "short")


def _select(row: Metric, where: str, part: str = "") -> str:
    return f"{row.prometheus_name}{part}{{{where}}}" if where else f"{row.prometheus_name}{part}"


def _gathered(expr: str, by: Sequence[str], how: str) -> Curve:
    return Curve(f"{how} by ({', '.join(by)}) ({expr})" if by else f"{how}({expr})", _legend(by))


def _quantile(row: Metric, part: float, by: Sequence[str], where: str) -> str:
    group = ", ".join(("le", *by))
    return f"histogram_quantile({part}, sum by ({group}) (rate({_select(row, where, '_bucket')}[$__rate_interval])))"


def _legend(by: Sequence[str]) -> str:
    return " ".join(f"{{{{{label}}}}}" for label in by) or "all"
