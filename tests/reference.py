"""What stock transformers makes of a prompt alone, and whether an answer that differs differs only by a near tie.

Forwards are not bitwise the same at all batch sizes: fp32 logits move by about 2e-5. Where a token differs, the
reference's two best logits must be closer than ``NEAR_TIE`` there; the case is counted, and the rest is compared with a
reference that continues from the choice made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-4


class Reference:
    """Stock transformers, one prompt at a time."""

    def __init__(self, model_dir: Any) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def generate(self, token_ids: list[int], outputs: int) -> tuple[list[int], torch.Tensor]:
        """Tokens that follow, and the logits [tokens, vocabulary] that they were chosen from."""
        inputs = torch.tensor([token_ids])
        result = self._model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=outputs,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return result.sequences[0, len(token_ids) :].tolist(), torch.cat(result.logits)

    def near_ties(self, name: str, prompt: Sequence[int], made: Sequence[int], *, max_output_tokens: int) -> int:
        """How often ``made`` has the other of two nearly equal tokens. Fails with ``name`` on another difference."""
        ties = 0
        compared = 0
        while compared < len(made):
            expected, logits = self.generate([*prompt, *made[:compared]], max_output_tokens - compared)
            rest = list(made[compared:])
            if rest == expected:
                break
            same = next((at for at, pair in enumerate(zip(rest, expected, strict=False)) if pair[0] != pair[1]), None)
            assert same is not None, f"{name}: {len(rest)} tokens instead of {len(expected)}"
            best = logits[same].topk(2)
            gap = float(best.values[0] - best.values[1])
            assert rest[same] in best.indices.tolist(), f"{name}: {rest} is not {expected}"
            assert gap < NEAR_TIE, f"{name}: {rest} is not {expected} (gap {gap:.2e})"
            ties += 1
            compared += same + 1
        return ties
