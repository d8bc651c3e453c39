"""The token ids of an emulated model.

Owns how a prompt tells its engines, and nobody else, how long the answer will be: by its last token. Policies see
counts of tokens only, so to them the length is as unknown as a real model's; and as the length is part of the sequence,
it goes wherever the sequence goes, by handoff, migration or recovery. At the end of the prompt, prompts that begin
alike still share their KV. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from starmesh.engine.batch import BatchItem
from starmesh.engine.emulated import FILLER_TOKEN_ID, FILLER_TOKENS

MAX_OUTPUT_TOKENS: Final = 1 << 20
"""The longest answer that a prompt can ask for."""

_LENGTH_TOKEN_ID: Final = FILLER_TOKEN_ID + FILLER_TOKENS
VOCABULARY_TOKENS: Final = _LENGTH_TOKEN_ID + MAX_OUTPUT_TOKENS + 1
_ENDLESS: Final = 1 << 62


def length_token_id(output_tokens: int) -> int:
    """The last token of a prompt whose answer has ``output_tokens`` tokens, the end of the sequence included. Raises
    ValueError."""
    if not 1 <= output_tokens <= MAX_OUTPUT_TOKENS:
        raise ValueError(f"an answer has 1 to {MAX_OUTPUT_TOKENS} tokens, not {output_tokens}")
    return _LENGTH_TOKEN_ID + output_tokens


def output_tokens_of(prompt_token_ids: Sequence[int]) -> int | None:
    """How long the answer will be; None for a prompt that does not say."""
    output_tokens = prompt_token_ids[-1] - _LENGTH_TOKEN_ID
    return output_tokens if output_tokens > 0 else None


def ends_at(item: BatchItem) -> int:
    """At how many tokens, prompt included, a sampling item's sequence ends by itself. One that does not say, such as
    one of a client's own token ids, goes on to its limit, as one that ignores its end does."""
    assert item.history is not None
    output_tokens = item.history[item.prompt_tokens - 1] - _LENGTH_TOKEN_ID
    ignores = item.sampling is not None and item.sampling.ignore_eos
    return item.prompt_tokens + output_tokens if output_tokens > 0 and not ignores else _ENDLESS
