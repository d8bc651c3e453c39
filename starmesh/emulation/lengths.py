"""How long the answers to ordinary prompts are, which do not say so: drawn from a hash of the prompt.

Owns the draw. The same prompt gets the same length, as it does from a greedy model.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from starmesh.lengths import LENGTH_MODELS


def draw_output_tokens(model: str, prompt: bytes) -> int:
    """The output tokens of the answer to ``prompt`` under the named one of LENGTH_MODELS. Raises KeyError for an
    unknown one."""
    part = int.from_bytes(blake2b(prompt, digest_size=8).digest()) / 2**64
    return max(1, round(float(LENGTH_MODELS[model].outputs.at(np.array([part]))[0])))
