"""Chooses each sequence's next token from its logits.

Random numbers are counter-based: a token's number depends on its sequence's seed and its position alone, so that a
sequence continued elsewhere, in other company or after recomputation draws the same ones. Every operation works on
rows independently, so a row's token does not depend on its batch mates.

Sampling inverts the cumulative distribution **over token ids in order**, not over tokens sorted by probability:
rounding that swaps two nearly equal logits would exchange their whole intervals in a sorted distribution, and so
change the token for many random numbers; in id order it moves the bounds by about the rounding itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from starmesh.types import SamplingParams

_MASK = 0xFFFFFFFF
# Dividing by a smaller temperature could overflow, and would pick the likeliest token anyway.
_GREEDY_BELOW = 1e-5
# Most nuclei are small: this many top tokens are tried before a whole vocabulary is sorted.
_NUCLEUS_GUESS = 512


class BrokenLogits(Exception):
    """The model produced logits that no token can be chosen from (not a number, or infinite)."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the choice of one token depends on besides its logits. ``history``: all tokens before it."""

    request_id: str
    sampling: SamplingParams
    history: Sequence[int]


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """One token id for each row of ``logits`` [rows, vocabulary] (any float dtype, any device).

    Repetition penalty, temperature, top-k, then top-p, with the semantics of the logits processors of transformers'
    ``generate``, except that tokens whose probability equals that of the last one kept are kept too. Raises
    BrokenLogits naming the first request whose logits are not usable.
    """
    scores = logits.float()
    if any(row.sampling.repetition_penalty != 1.0 for row in rows):
        scores = _penalised(scores, rows)
    best, best_ids = scores.max(dim=-1)  # propagates NaN
    usable = torch.isfinite(best).tolist()
    if not all(usable):
        raise BrokenLogits(
            f"request {rows[usable.index(False)].request_id}: the model's logits are not finite; check the weights, or "
            "run in float32"
        )
    token_ids: list[int] = best_ids.tolist()
    drawn = [index for index, row in enumerate(rows) if row.sampling.temperature >= _GREEDY_BELOW]
    if drawn:
        whole = len(drawn) == len(rows)
        chosen = _draw(scores if whole else scores[drawn], [rows[index] for index in drawn])
        for index, token_id in zip(drawn, chosen, strict=True):
            token_ids[index] = token_id
    return token_ids


def _penalised(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Divide positive and multiply negative scores of tokens seen before (Keskar et al., CTRL, 2019, eq. 2)."""
    scores = scores.clone()
    for row, params in zip(scores, rows, strict=True):
        penalty = params.sampling.repetition_penalty
        if penalty != 1.0 and params.history:
            seen = torch.tensor(sorted(set(params.history)), device=scores.device)
            values = row[seen]
            row[seen] = torch.where(values < 0, values * penalty, values / penalty)
    return scores


def _draw(scores: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Sample each row of ``scores`` by its own temperature, top-k, top-p, seed and position."""
    device = scores.device
    temperatures = torch.tensor([row.sampling.temperature for row in rows], device=device)
    scores = scores / temperatures[:, None]
    scores = _keep_top_k(scores, [row.sampling.top_k for row in rows])
    # Unnormalised probabilities, at most 1: no sum is needed, and none can depend on the batch.
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True)).double()
    weights = _keep_top_p(weights, [row.sampling.top_p for row in rows])
    cumulative = weights.cumsum(dim=-1)
    uniforms = torch.tensor(
        [uniform(row.sampling.seed, len(row.history)) for row in rows], dtype=torch.float64, device=device
    )
    totals = cumulative[:, -1]
    # The first id whose cumulative weight passes the target. Rounding could lift a target to the total, past every id.
    targets = torch.minimum(uniforms * totals, torch.nextafter(totals, torch.zeros_like(totals)))[:, None]
    chosen: list[int] = torch.searchsorted(cumulative, targets, right=True).flatten().tolist()
    return chosen


def _keep_top_k(scores: torch.Tensor, top_ks: Sequence[int]) -> torch.Tensor:
    vocabulary = scores.shape[-1]
    limited = [index for index, top_k in enumerate(top_ks) if 0 < top_k < vocabulary]
    if not limited:
        return scores
    sizes = torch.tensor([top_ks[index] for index in limited], device=scores.device)
    highest = scores[limited].topk(int(sizes.max()), dim=-1).values
    floors = torch.full((len(top_ks), 1), -torch.inf, device=scores.device)
    floors[limited] = highest.gather(1, sizes[:, None] - 1)
    return scores.masked_fill(scores < floors, -torch.inf)


def _keep_top_p(weights: torch.Tensor, top_ps: Sequence[float]) -> torch.Tensor:
    """Zero what lies outside the smallest set of likeliest tokens whose probability reaches top_p."""
    limited = [index for index, top_p in enumerate(top_ps) if top_p < 1.0]
    if not limited:
        return weights
    chosen = weights[limited]
    shares = torch.tensor([top_ps[index] for index in limited], dtype=torch.float64, device=weights.device)[:, None]
    # Summed in id order as in ``_draw``: a row's sum must not depend on how it is sorted.
    needed = shares * chosen.cumsum(dim=-1)[:, -1:]
    guess = min(_NUCLEUS_GUESS, weights.shape[-1])
    ordered = chosen.topk(guess, dim=-1).values
    if guess < weights.shape[-1] and bool((ordered.cumsum(dim=-1)[:, -1:] < needed).any()):
        ordered = chosen.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    kept = (before < needed).sum(dim=-1, keepdim=True).clamp(min=1)
    floors = torch.zeros((len(top_ps), 1), dtype=weights.dtype, device=weights.device)
    floors[limited] = ordered.gather(1, kept - 1)
    return weights.masked_fill(weights < floors, 0.0)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of ``position`` in a sequence with ``seed``: 53 bits of Philox4x32-10."""
    low, high, _, _ = philox4x32(
        (position & _MASK, (position >> 32) & _MASK, 0, 0), (seed & _MASK, (seed >> 32) & _MASK)
    )
    return ((high << 32 | low) >> 11) * 2.0**-53


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _MASK, (product0 >> 32) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3
