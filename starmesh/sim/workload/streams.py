"""Random streams by name: what one part of a workload draws never depends on what another one does."""

from __future__ import annotations

import numpy as np


def stream(seed: int, name: str) -> np.random.Generator:
    """The stream ``name`` of ``seed`` >= 0, from its beginning. Counter based (Philox), the same on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *name.encode()))))
