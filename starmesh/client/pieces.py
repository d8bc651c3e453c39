"""What a client gets: pieces of an answer, and the whole of it. Values only."""

from __future__ import annotations

from dataclasses import dataclass

from starmesh.rpc import convert
from starmesh.types import FinishReason
from starmesh.v1 import inference_pb2

__all__ = ["Answer", "FinishReason", "Piece", "Usage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """A request's tokens and what befell it. After a failover to another router ``cached_tokens``, ``recoveries`` and
    ``migrations`` are of the last one's."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    recoveries: int
    migrations: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New tokens and new text; a token's text may come in a later piece. ``offset`` output tokens precede it.
    ``finish_reason`` and ``usage`` are set in the last one alone."""

    text: str
    token_ids: tuple[int, ...]
    offset: int
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer. ``usage`` is None of a request that was cancelled where no router could be reached."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage | None


def piece_of(message: inference_pb2.GenerateResponse) -> Piece:
    """What a message carries."""
    usage = message.usage
    return Piece(
        text=message.text,
        token_ids=tuple(message.token_ids),
        offset=message.offset,
        finish_reason=convert.finish_reason(message.finish_reason),
        usage=Usage(
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            recoveries=usage.recoveries,
            migrations=usage.migrations,
        )
        if message.HasField("usage")
        else None,
    )
