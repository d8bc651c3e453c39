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
        self._median, self._upper = tables.median, tables.upper
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
        median = self._median.at(
            np.log((lengths / self._cap).astype(np.float32)),
            np.log((remaining / self._cap).astype(np.float32)),
            normals[0],
            apart=lengths >= self._cap,
        )
        beyond = self._upper.at(median, output_tokens / self._cap, normals[1])
        tokens = np.exp(median)
        tokens *= self._cap
        return tokens, tokens * np.exp(beyond)


class DenseTable:
    """Values by two numbers and a normal one, made from quantiles [rows, columns, levels] by interpolation, so finely
    that its nearest entry will do. Beyond the outermost row or column it goes on as there. One more row than ``rows``
    stands apart from the others: nothing is between it and them."""

    def __init__(
        self, rows: Sequence[float], columns: Sequence[float], levels: Sequence[float], values: npt.ArrayLike
    ) -> None:
        normals = [NormalDist().inv_cdf(level) for level in levels]
        self._rows, self._columns = _Axis(rows, _DENSE[0]), _Axis(columns, _DENSE[1])
        self._normals = _Axis((-_MOST_NORMAL, _MOST_NORMAL), _DENSE[2])
        table = np.asarray(values, dtype=np.float64)
        between = _interpolated(table[: len(rows)], 0, self._rows.points, rows)
        table = np.concatenate((between, table[len(rows) :]))
        table = _interpolated(table, 1, self._columns.points, columns)
        self._table = _interpolated(table, 2, self._normals.points, normals).astype(np.float32).ravel()

    def at(
        self,
        row: npt.NDArray[Any],
        column: npt.NDArray[Any],
        normal: npt.NDArray[Any],
        *,
        apart: npt.NDArray[np.bool_] | None = None,
    ) -> Singles:
        """[n], at n places; those ``apart`` are in the row that stands apart."""
        index = self._rows.index(row)
        if apart is not None:
            np.putmask(index, apart, _DENSE[0])
        index *= _DENSE[1]
        index += self._columns.index(column)
        index *= _DENSE[2]
        index += self._normals.index(normal)
        found: Singles = self._table.take(index)
        return found


def _interpolated(
    table: npt.NDArray[np.float64], axis: int, wanted: npt.NDArray[np.float64], known: Sequence[float]
) -> npt.NDArray[np.float64]:
    return np.apply_along_axis(lambda line: np.interp(wanted, known, line), axis, table)


class _Axis:
    """``count`` points evenly from the first to the last of ``known``."""

    def __init__(self, known: Sequence[float], count: int) -> None:
        self.points = np.linspace(known[0], known[-1], count)
        self._per_step = float(1.0 / (self.points[1] - self.points[0]))
        self._offset = float(0.5 - known[0] * self._per_step)
        self._last = count - 1

    def index(self, values: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
        """The nearest point's number. In few operations: a load report has few sequences, and there are many."""
        places = values * self._per_step
        places += self._offset
        np.maximum(places, 0.0, out=places)
        np.minimum(places, self._last, out=places)
        return places.astype(np.intp)


class _Tables:
    def __init__(self, file: dict[str, Any]) -> None:
        self.file = file
        levels, median, upper = file["levels"], file["median"], file["upper"]
        # The last length is that of requests that their limit cut: a kind of its own, not a longer one.
        lengths, remaining = np.log(median["length"][:-1]).tolist(), np.log(median["remaining"]).tolist()
        self.median = DenseTable(lengths, remaining, levels, np.log(median["values"]))
        self.upper = DenseTable(np.log(upper["median"]).tolist(), upper["generated"], levels, upper["values"])


@cache
def _tables() -> _Tables:
    """Read once."""
    path = resources.files(__package__) / "measured.json"
    return _Tables(json.loads(path.read_text(encoding="utf-8")))


def measured_facts() -> dict[str, Any]:
    """What the file says of itself: where it comes from, and the errors that were measured."""
    file = _tables().file
    return {"provenance": file["provenance"], "measured": file["measured"]}
