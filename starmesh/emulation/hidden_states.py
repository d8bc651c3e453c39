"""What stands for an emulated sequence's hidden state: how long its output will be, for a predictor that knows.

Owns how such numbers are written as hidden states, which travel as float16, and read again. What a predictor makes of
the truth, such as the errors of a real one, is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from zlib import crc32

import numpy as np
import numpy.typing as npt

from starmesh.emulation.tokens import output_tokens_of
from starmesh.engine.batch import BatchItem
from starmesh.types import HiddenLayout, KvLayout

_DIGIT: Final = 1 << 11
"""float16 holds whole numbers exactly up to here."""

_NUMBERS: Final = 3
_LARGEST: Final = _DIGIT * _DIGIT - 1


@dataclass(frozen=True, slots=True)
class KnownLengths:
    """Of n sequences, [n] each: a key of the request, how many tokens the output will have in all, and its limit."""

    keys: npt.NDArray[np.int64]
    output_tokens: npt.NDArray[np.int64]
    limits: npt.NDArray[np.int64]


def hidden_layout(layout: KvLayout) -> HiddenLayout:
    """The layout of an emulated model's hidden states."""
    return HiddenLayout(layout.model_revision, (1,), 2 * _NUMBERS)


def write_lengths(items: Sequence[BatchItem]) -> npt.NDArray[np.float32]:
    """The hidden states of items that sample, [items, 1, width]."""
    numbers = []
    for item in items:
        assert item.history is not None and item.sampling is not None
        limit = item.sampling.max_output_tokens
        own = output_tokens_of(item.history[: item.prompt_tokens])
        numbers.append((crc32(item.request_id.encode()), limit if own is None else min(own, limit), limit))
    bounded = np.array(numbers, np.int64).reshape(len(items), _NUMBERS)
    bounded[:, 0] &= _LARGEST
    bounded = np.minimum(bounded, _LARGEST)
    digits = np.stack([bounded // _DIGIT, bounded % _DIGIT], axis=2)
    return digits.reshape(len(items), 1, 2 * _NUMBERS).astype(np.float32)


def read_lengths(hidden_states: npt.NDArray[np.float16]) -> KnownLengths:
    """What [n, 1, width] hidden states hold. Raises ValueError for those of anything else."""
    if hidden_states.shape[1:] != (1, 2 * _NUMBERS):
        raise ValueError(f"emulated hidden states are [n, 1, {2 * _NUMBERS}], not {hidden_states.shape}")
    digits = hidden_states.astype(np.int64).reshape(-1, _NUMBERS, 2)
    numbers = digits[:, :, 0] * _DIGIT + digits[:, :, 1]
    return KnownLengths(*numbers.T)
