"""The error of our trained predictor, as measured on held-out requests of the default model.

Owns the draw from ``measured.json``, which ``benchmarks.predictor.simulated`` writes: what the predictor answered given
the request's length and what remained. A normal number that changes slowly along a request (``noise``) picks the
quantile, a second one the upper quantile's distance from the median.

The predictor was measured on a small model with outputs of at most 1,024 tokens. All lengths, and the places of the
noise's knots, are taken relative to the cap, so that the same tables serve 32K. That the error grows with the cap is
an assumption; nobody measured it there. What is nearer to its end than the finest sample (2 % of the cap) is predicted
as at that sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from starmesh.sim.predictors.noise import Persistence, SlowNoise
from starmesh.sim.predictors.predictor import Integers, Singles

_DENSE: Final = (24, 96, 64)
"""Entries of a dense table along its two axes and along the normal number: then looking up needs no interpolation."""

_MOST_NORMAL: Final = 2.2
"""A little beyond the outermost quantiles that are stored, 2 % and 98 %: no more is known of the tails."""


class MeasuredPredictor:
    """Errors of ``measured.json``, scaled to ``cap_tokens``."""

    def __init__(self, *, seed: int, cap_tokens: int) -> None:
        tables = _tables()
        self._cap = cap_tokens
        self._median, self._cut = tables.median, tables.cut
        self._upper = tables.upper
        persistence = tables.file["persistence"]
        self._noise = SlowNoise(
            seed=seed,
            slow_tokens=max(1.0, tables.file["slow_knots"] * cap_tokens),
            fast_tokens=max(1.0, tables.file["fast_knots"] * cap_tokens),
            channels=(Persistence(**persistence["median"]), Persistence(**persistence["upper"])),
        )

    def answers(self, keys: Integers, output_tokens: Integers, remaining: Integers) -> tuple[Singles, Singles]:
        """See ``ErrorModel``."""
        normals = self._noise.draw(keys, output_tokens)
        lengths = output_tokens + remaining
        left = np.log((remaining / self._cap).astype(np.float32))
        median = self._median.at(np.log((lengths / self._cap).astype(np.float32)), left, normals[0])
        cut = np.flatnonzero(lengths >= self._cap)
        if len(cut):
            median[cut] = self._cut.at(left[cut], left[cut], normals[0][cut])
        beyond = self._upper.at(median, output_tokens / self._cap, normals[1])
        tokens = np.exp(median) * self._cap
        return tokens, tokens * np.exp(beyond)


class DenseTable:
    """Values by two numbers and a normal one, made from quantiles [rows, columns, levels] by interpolation, so finely
    that its nearest entry will do. Beyond the outermost row or column it goes on as there."""

    def __init__(
        self, rows: Sequence[float], columns: Sequence[float], levels: Sequence[float], values: npt.ArrayLike
    ) -> None:
        normals = [NormalDist().inv_cdf(level) for level in levels]
        self._axes = (_Axis(rows, _DENSE[0]), _Axis(columns, _DENSE[1]))
        self._normal = _Axis((-_MOST_NORMAL, _MOST_NORMAL), _DENSE[2])
        table = np.asarray(values, dtype=np.float64)
        for axis, (dense, known) in enumerate(
            ((self._axes[0], rows), (self._axes[1], columns), (self._normal, normals))
        ):
            table = np.apply_along_axis(lambda line: np.interp(dense.points, known, line), axis, table)  # noqa: B023
        self._table = np.ascontiguousarray(table, dtype=np.float32).ravel()

    def at(self, row: npt.NDArray[Any], column: npt.NDArray[Any], normal: npt.NDArray[Any]) -> Singles:
        """[n], at n places."""
        index = self._axes[0].index(row)
        index *= _DENSE[1]
        index += self._axes[1].index(column)
        index *= _DENSE[2]
        index += self._normal.index(normal)
        found: Singles = self._table.take(index)
        return found


class _Axis:
    """``count`` points evenly from the first to the last of ``known``; a single one is everywhere the same."""

    def __init__(self, known: Sequence[float], count: int) -> None:
        self.points = np.linspace(known[0], known[-1], count)
        step = self.points[1] - self.points[0]
        self._first, self._last = float(known[0]), count - 1
        self._per_step = 1.0 / step if step else 0.0

    def index(self, values: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
        places = (values - self._first) * self._per_step + 0.5
        return np.asarray(np.clip(places, 0, self._last), dtype=np.intp)


class _Tables:
    def __init__(self, file: dict[str, Any]) -> None:
        self.file = file
        levels = file["levels"]
        median = file["median"]
        values = np.log(median["values"])
        remaining = np.log(median["remaining"])
        # The last length is that of requests that their limit cut: a kind of its own, not a longer one.
        self.median = DenseTable(np.log(median["length"][:-1]), remaining, levels, values[:-1])
        self.cut = DenseTable((0.0,), remaining, levels, values[-1:])
        upper = file["upper"]
        self.upper = DenseTable(np.log(upper["median"]), upper["generated"], levels, upper["values"])


@cache
def _tables() -> _Tables:
    """Read once."""
    path = resources.files(__package__) / "measured.json"
    return _Tables(json.loads(path.read_text(encoding="utf-8")))


def measured_facts() -> dict[str, Any]:
    """What the file says of itself: where it comes from, and the errors that were measured."""
    file = _tables().file
    return {"provenance": file["provenance"], "measured": file["measured"]}
