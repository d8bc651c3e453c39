"""Requests of known lengths for an emulated cluster: for benchmarks, replays and tests.

Owns the two ways to ask: by token ids, exact and from anywhere, and by a text that people can write.
"""

from __future__ import annotations

from starmesh.emulation.tokenizer import filler_token_ids
from starmesh.emulation.tokens import length_token_id
from starmesh.v1 import inference_pb2, sequence_pb2


def emulated_request(
    prompt_tokens: int, output_tokens: int, *, request_id: str, max_output_tokens: int | None = None
) -> inference_pb2.GenerateRequest:
    """A request of ``prompt_tokens`` (at least 1) that ends by itself after ``output_tokens``, which only the engines
    know, or at ``max_output_tokens``, which everybody does. Prompts of different ids have no tokens in common.

    Raises ValueError for lengths that cannot be.
    """
    if prompt_tokens < 1:
        raise ValueError(f"a prompt has at least 1 token, not {prompt_tokens}")
    filler = filler_token_ids(prompt_tokens - 1, request_id.encode())
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        token_ids=inference_pb2.TokenIds(token_ids=[*filler, length_token_id(output_tokens)]),
        sampling=sequence_pb2.SamplingParams(max_output_tokens=max_output_tokens),
    )


def emulated_prompt(prompt_tokens: int, output_tokens: int, *, note: str = "") -> str:
    """The same as a text; ``note`` tells prompts of equal lengths apart."""
    return f"emulate prompt_tokens={prompt_tokens} output_tokens={output_tokens} {note}".rstrip()
