"""Sequences whose hidden states tell their remaining length, with noise: what a predictor can learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from starmesh.prediction.shards import Manifest, SampledSequence, ShardDirectory
from starmesh.types import HiddenLayout

LAYOUT = HiddenLayout("rev-1", (2, 3), 16)
CAP = 400


def write_samples(directory: Path, requests: int, *, seed: int = 0, samples_per_prompt: int = 1) -> Path:
    """Shards of log-normal lengths, cut at ``CAP``."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(2, 16))
    manifest = Manifest(
        layout=LAYOUT,
        model="tiny",
        dtype="float32",
        every_tokens=20,
        sampling={"temperature": 0.7},
        max_output_tokens=CAP,
    )
    sequences = []
    for number in range(requests):
        wanted = int(rng.lognormal(4.6, 0.8)) + 1
        length = min(wanted, CAP)
        places = np.arange(0, length, 20, dtype=np.int32)
        # The state knows what the model wants, not where it is cut.
        signal = np.log1p(wanted - places)[:, None, None] * direction
        states = signal + rng.normal(size=(len(places), 2, 16))
        sequences.append(
            SampledSequence(
                request_id=f"p{number // samples_per_prompt}-{number % samples_per_prompt}",
                prompt_tokens=int(rng.integers(5, 50)),
                total_output_tokens=length,
                finished=wanted <= CAP,
                output_tokens=places,
                hidden_states=states.astype(np.float16),
            )
        )
    shards = ShardDirectory(directory, manifest)
    for start in range(0, requests, 100):
        shards.write(sequences[start : start + 100])
    return directory
