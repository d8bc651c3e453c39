"""A predictor with the errors that the paper reports of its own.

Owns a model of few parameters, chosen so that on the "reasoning" mix three published figures come out: mean absolute
error 3,873 tokens over samples every 20 tokens, and on outputs of 30 to 32K 18,256 from the prompt alone and 2,929
after 8K generated tokens. A test holds it to within 10 %. The paper says no more, so the model's form is our choice:

    knows(t)  = 1 - (1 - KNOWS_FIRST) exp(-t / KNOWS_TOKENS)
    median(t) = ((1 - knows) typical(t) + knows remaining) exp(SPREAD z(t) + LEAN min(t / LEAN_TOKENS, 1))
    upper(t)  = median(t) exp(UPPER_LAST + UPPER_FIRST (1 - knows))

``typical(t)`` is the median of what remains over all requests of the mix that got as far as t: a predictor that sees
nothing answers that. z is normal and changes slowly along a request. The lean to the long side is what lets long
outputs be predicted well (the cap bounds them) while the whole mix is not. The upper quantile, of which the paper has
none, holds for about 90 % of the samples. Tokens are for a cap of 32,768 and scale with it, as ours do in ``measured``.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from starmesh.lengths import LENGTH_MODELS, Quantiles
from starmesh.sim.predictors.noise import Persistence, SlowNoise
from starmesh.sim.predictors.predictor import Integers, Numbers

KNOWS_FIRST: Final = 0.32
KNOWS_TOKENS: Final = 12_000.0
SPREAD: Final = 0.4
LEAN: Final = 0.1
LEAN_TOKENS: Final = 8192.0
UPPER_FIRST: Final = 0.5
UPPER_LAST: Final = 0.3

SLOW_KNOTS: Final = 0.1
FAST_KNOTS: Final = 0.02
PERSISTENCE: Final = Persistence(request=0.46, slow=0.38, fast=0.16)
"""About as those of our own predictor persist (``measured.json``), knots as parts of the cap."""

_PLACES: Final = 1024


class PaperPredictor:
    """The formulas above, with their tokens scaled to ``cap_tokens``."""

    def __init__(self, *, seed: int, cap_tokens: int) -> None:
        mix = LENGTH_MODELS["reasoning"]
        self._scale = cap_tokens / mix.cap_tokens
        self._every = mix.cap_tokens / _PLACES
        self._typical = _typical(mix.outputs, np.linspace(0.0, mix.cap_tokens, _PLACES + 1))
        self._noise = SlowNoise(
            seed=seed,
            slow_tokens=max(1.0, SLOW_KNOTS * cap_tokens),
            fast_tokens=max(1.0, FAST_KNOTS * cap_tokens),
            channels=(PERSISTENCE,),
        )

    def answers(self, keys: Integers, output_tokens: Integers, remaining: Integers) -> tuple[Numbers, Numbers]:
        """See ``ErrorModel``."""
        place = output_tokens / self._scale
        unknown = (1.0 - KNOWS_FIRST) * np.exp(place / -KNOWS_TOKENS)
        typical = self._typical.take((place / self._every).astype(np.intp), mode="clip") * self._scale
        error = SPREAD * self._noise.draw(keys, output_tokens)[0]
        error += LEAN * np.minimum(place / LEAN_TOKENS, 1.0)
        median = (remaining + unknown * (typical - remaining)) * np.exp(error)
        return median, median * np.exp(UPPER_LAST + UPPER_FIRST * unknown)


def _typical(outputs: Quantiles, places: Numbers) -> Numbers:
    """The median of what remains to those that got as far as each place."""
    parts, tokens = np.array(outputs.points).T
    logs = np.log(tokens)
    # Of a mass at the cap nothing is shorter: its first point counts.
    own_ends = logs < logs[-1]
    own_ends[int(own_ends.sum())] = True
    shorter = np.interp(np.log(np.maximum(places, 1.0)), logs[own_ends], parts[own_ends], left=0.0)
    halfway = np.exp(np.interp((1.0 + shorter) / 2, parts, logs))
    return np.asarray(np.maximum(halfway - places, 1.0))
