"""Hidden states averaged over a sequence's samples so far: what one token's state says of the length is mostly noise.

Owns the average, for a whole stored sequence and for sequences as their samples come in. The weight of a sample falls
with the tokens generated since, by 1/e every ``TIME_CONSTANT_TOKENS``; the weights add up to 1, and the first sample
starts the average. Training and serving both use ``advance``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Final

import numpy as np
import numpy.typing as npt

from starmesh.prediction.batch import Floats

TIME_CONSTANT_TOKENS: Final = 40.0
"""At one sample every 20 tokens the newest weighs 0.39. On the default model one sample alone, a shorter or a longer
memory did worse (docs/predictor.md)."""


def advance(average: Floats, state: npt.NDArray[np.floating], tokens: int) -> Floats:
    """The average after ``state``, taken ``tokens`` > 0 after the one before; all of one shape."""
    weight = 1.0 - math.exp(-tokens / TIME_CONSTANT_TOKENS)
    return average + np.float32(weight) * (state.astype(np.float32) - average)


def averaged(states: npt.NDArray[np.float16], output_tokens: npt.NDArray[np.int32]) -> Floats:
    """The average at each sample of one sequence, [n, layers, width], for its states of that shape in the order of
    ``output_tokens`` [n]."""
    result = states.astype(np.float32)
    for index in range(1, len(result)):
        tokens = int(output_tokens[index] - output_tokens[index - 1])
        result[index] = advance(result[index - 1], result[index], tokens)
    return result


class RunningAverages:
    """The averages of running sequences, at most ``most``: the one that was silent longest is forgotten first, and
    starts anew with its next sample."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._averages: OrderedDict[str, tuple[int, Floats]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._averages)

    def add(self, request_id: str, output_tokens: int, state: npt.NDArray[np.float16]) -> Floats:
        """The average [layers, width] with this sample. One that is not newer than the last, sent twice or late,
        changes nothing; but a prompt's begins anew, since it may be another request's of the same name, of which no end
        was told."""
        known = self._averages.get(request_id)
        if known is None or output_tokens == 0 or known[1].shape != state.shape:
            average = state.astype(np.float32)
        elif output_tokens <= known[0]:
            return known[1]
        else:
            average = advance(known[1], state, output_tokens - known[0])
        self._averages[request_id] = (output_tokens, average)
        self._averages.move_to_end(request_id)
        if len(self._averages) > self._most:
            self._averages.popitem(last=False)
        return average

    def end(self, request_id: str) -> None:
        """Forget a sequence that has ended."""
        self._averages.pop(request_id, None)
