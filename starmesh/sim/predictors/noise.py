"""Errors that change slowly: normal numbers that belong to a request and a place in its output.

Owns the draws. They are hashes of seed, request and place, so nothing is kept of a request, and the order of the
questions does not matter. Between slow knots they are interpolated, and scaled to unit variance everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt

from starmesh.sim.predictors.predictor import Integers, Numbers, Singles

CHANNELS: Final = 2
"""Independent draws from one hash, of 12 bits each: 4,096 different normal numbers up to 3.7 are enough for errors."""

_BITS: Final = 12
_GOLDEN: Final = np.uint32(0x9E3779B9)
_NUMBERS: Final = np.array([[0], [2], [4], [1]], dtype=np.uint32)
_WORD: Final = (1 << 32) - 1
_Words = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Persistence:
    """How an error's variance, 1, is made up: what a request keeps for good, what changes from one slow knot to the
    next, and what anew at each fast one."""

    request: float
    slow: float
    fast: float


class SlowNoise:
    """Draws for one predictor, one number per element of ``channels`` (at most CHANNELS). ``slow_tokens`` and
    ``fast_tokens`` are the output tokens between knots."""

    def __init__(self, *, seed: int, slow_tokens: float, fast_tokens: float, channels: tuple[Persistence, ...]) -> None:
        low, high = np.array([seed & _WORD, seed >> 32 & _WORD], dtype=np.uint32)[:, None]
        self._seed = _mixed(_mixed(high + _GOLDEN) + low)
        self._slow_tokens = slow_tokens
        self._fast_tokens = fast_tokens
        spread = np.array([(one.request, one.slow, one.slow, one.fast) for one in channels])
        self._spread = np.sqrt(spread).astype(np.float32)[:, None, :]
        self._shifts = np.uint32(_BITS) * np.arange(len(channels), dtype=np.uint32)[:, None, None]

    def draw(self, keys: Integers, output_tokens: Integers) -> Singles:
        """Standard normal numbers [channels, n], independent of each other and between requests."""
        places = output_tokens / self._slow_tokens
        before = places.astype(np.uint32)
        after_part = places - before
        before_part = 1.0 - after_part
        norm = 1.0 / np.sqrt(before_part * before_part + after_part * after_part)
        weights = np.ones((4, len(keys)), dtype=np.float32)
        np.multiply(before_part, norm, out=weights[1], casting="same_kind")
        np.multiply(after_part, norm, out=weights[2], casting="same_kind")
        # Each knot has a number of its own: 0 is the request's, even ones are slow, odd ones fast.
        numbers = np.zeros((4, len(keys)), dtype=np.uint32)
        numbers[1] = numbers[2] = before + before
        numbers[3] = output_tokens / self._fast_tokens
        numbers[3] += numbers[3]
        numbers += _NUMBERS
        numbers *= _GOLDEN
        numbers += _mixed(keys.astype(np.uint32) ^ self._seed)
        picked = (_mixed(numbers) >> self._shifts) & np.uint32((1 << _BITS) - 1)
        normals = _normals().take(picked)
        normals *= weights
        total: Singles = np.matmul(self._spread, normals)[:, 0]
        return total


def correlation(lag: npt.ArrayLike, *, held: bool = False) -> Numbers:
    """Between places ``lag`` knots apart, averaged over where between knots they are: of slow knots, interpolated
    between, 1 at 0 and 0 from 2; of fast ones, ``held`` until the next, 0 from 1."""
    wanted = np.abs(np.asarray(lag, dtype=np.float64))[..., None]
    begins = (np.arange(64) + 0.5) / 64
    ends = begins + wanted
    crossed = np.floor(ends)
    if held:
        return np.asarray((crossed == 0).mean(axis=-1))
    (first, second), (left, right) = _unit(begins), _unit(ends - crossed)
    found: Numbers = np.where(crossed == 0, first * left + second * right, (crossed == 1) * second * left).mean(axis=-1)
    return found


def _unit(part: Numbers) -> tuple[Numbers, Numbers]:
    norm = 1.0 / np.sqrt((1.0 - part) ** 2 + part**2)
    return (1.0 - part) * norm, part * norm


@cache
def _normals() -> Singles:
    normal, count = NormalDist(), 1 << _BITS
    values = np.array([normal.inv_cdf((index + 0.5) / count) for index in range(count)])
    scaled: Singles = (values / values.std()).astype(np.float32)
    return scaled


def _mixed(words: _Words) -> _Words:
    """The finalizer of MurmurHash3 (Appleby, public domain), in place: every bit depends on every bit."""
    words ^= words >> np.uint32(16)
    words *= np.uint32(0x85EBCA6B)
    words ^= words >> np.uint32(13)
    words *= np.uint32(0xC2B2AE35)
    words ^= words >> np.uint32(16)
    return words
