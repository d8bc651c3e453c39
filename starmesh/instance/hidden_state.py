"""A hidden state as it travels and is stored: little-endian float16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MAX_FLOAT16 = 65504.0
"""The largest float16. A few elements of some models' inner layers exceed it: they are clipped to it."""


def pack_hidden_state(hidden_state: Any) -> bytes:
    """``hidden_state`` [layers, width], an array of numpy or a CPU tensor, as bytes."""
    states: npt.NDArray[np.float32] = np.asarray(hidden_state)
    return np.clip(states, -MAX_FLOAT16, MAX_FLOAT16).astype("<f2").tobytes()
