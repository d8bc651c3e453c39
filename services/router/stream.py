"""The tokens of one request, exactly once and in order, whoever sends them. Pure.

Owns which output is new, stale or out of order. Owns no text (``answer``) and no waiting (``flight``).

Each output says under which epoch it was made and how many output tokens precede it. An instance that lost the
sequence may still be heard after its successor has begun, and messages may come twice: what precedes the next token
is trimmed, what is of an older epoch is refused, and a hole is never papered over.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from starmesh.types import FinishReason


class Verdict(Enum):
    """What an output turned out to be."""

    NEW = "new"
    """Tokens were added."""
    DUPLICATE = "duplicate"
    """It holds nothing that is not here already."""
    STALE = "stale"
    """It is of an epoch that is over, or the stream has ended."""
    GAP = "gap"
    """Tokens before it are missing: the sequence must be recovered from the tokens that are here."""
    END = "end"
    """The sequence ended with it; tokens may have been added too."""


class TokenStream:
    """The accepted output tokens of a request. They only ever grow, to ``max_output_tokens`` at most; that is 0 until
    the prompt's length is known."""

    __slots__ = ("epoch", "finish_reason", "max_output_tokens", "token_ids")

    def __init__(self, *, max_output_tokens: int = 0) -> None:
        self.max_output_tokens = max_output_tokens
        self.epoch = 0
        """The newest epoch that an output was accepted from, or that was begun."""
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def __repr__(self) -> str:
        end = f" {self.finish_reason.value}" if self.finish_reason is not None else ""
        return f"<TokenStream {len(self.token_ids)}/{self.max_output_tokens} tokens, epoch {self.epoch}{end}>"

    def begin(self, epoch: int) -> None:
        """Refuse outputs older than ``epoch`` from now on. Raises ValueError for an epoch that is over."""
        if epoch < self.epoch:
            raise ValueError(f"epoch {epoch} is older than {self.epoch}")
        self.epoch = epoch

    def accept(
        self, epoch: int, offset: int, token_ids: Sequence[int], finish_reason: FinishReason | None = None
    ) -> Verdict:
        """Take an output: ``offset`` output tokens precede ``token_ids``. Never takes half of one."""
        if epoch < self.epoch or self.finish_reason is not None:
            return Verdict.STALE
        held = self.token_ids
        known = len(held) - offset
        if known < 0:
            return Verdict.GAP
        self.epoch = epoch
        new = len(token_ids) - known
        if new > 0:
            held.extend(token_ids[known:] if known else token_ids)
            if len(held) >= self.max_output_tokens:
                # The client's limit holds whatever the instance does.
                if len(held) > self.max_output_tokens or finish_reason is None:
                    finish_reason = FinishReason.LENGTH
                del held[self.max_output_tokens :]
        # The end counts only where it belongs: after the last token. A late duplicate that ends earlier is of a past
        # that this stream has left behind.
        if finish_reason is not None and new >= 0:
            self.finish_reason = finish_reason
            return Verdict.END
        return Verdict.NEW if new > 0 else Verdict.DUPLICATE

    def end(self, finish_reason: FinishReason) -> bool:
        """End the stream from this side (cancel, or the tokens say so). Returns False when it had ended."""
        if self.finish_reason is not None:
            return False
        self.finish_reason = finish_reason
        return True

    def implied_finish(self, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Why the accepted tokens end the sequence, None when it goes on. An instance that dies between its last
        token and the word of the end leaves such a stream."""
        if not self.token_ids:
            return None
        if self.token_ids[-1] in eos_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_output_tokens else None
