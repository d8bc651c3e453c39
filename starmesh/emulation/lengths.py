"""How long the answers to ordinary prompts are, which do not say so: drawn from a hash of the prompt.

Owns the length models by name. The same prompt gets the same length, as it does from a greedy model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from types import MappingProxyType

import numpy as np

QUANTILES: Mapping[str, tuple[tuple[float, int], ...]] = MappingProxyType(
    {
        "chat": ((0.0, 1), (0.1, 20), (0.5, 200), (0.9, 600), (1.0, 2_000)),
        "reasoning": ((0.0, 50), (0.292, 1_000), (0.827, 30_000), (1.0, 32_000)),
    }
)
"""Points of each model's distribution: (part of the answers, output tokens that they do not exceed); between them the
logarithm of the tokens is linear. "chat" is our choice, shaped as public chat logs are. Of "reasoning" the two inner
points and the cap are the paper's (section Background: 29.2 % below 1K tokens, 17.3 % above 30K, cap of 32K)."""


def draw_output_tokens(model: str, prompt: bytes) -> int:
    """The output tokens of the answer to ``prompt`` under the named model. Raises KeyError for an unknown one."""
    parts, tokens = zip(*QUANTILES[model], strict=True)
    part = int.from_bytes(blake2b(prompt, digest_size=8).digest()) / 2**64
    return max(1, round(math.exp(np.interp(part, parts, np.log(tokens)))))
