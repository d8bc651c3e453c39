"""What the client gets of one request: its accepted tokens as pieces of tokens and text. Pure.

Owns the place up to which tokens have been turned into text and given out. A piece is made when the client can take
one, so tokens that come while it cannot are simply part of the next piece: what waits for a slow client is bounded by
the request's ``max_output_tokens``, and a fast one pays for each piece once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from services.router.stream import TokenStream
from starmesh.types import FinishReason


class Detokenizer(Protocol):
    """Tokens to text; ``starmesh.tokenizer.IncrementalDetokenizer`` and, in tests, simpler ones."""

    stopped: bool

    def feed(self, token_ids: list[int]) -> str:
        """Take tokens, return the text that they make final."""
        ...

    def finish(self) -> str:
        """Return the rest."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens and new text. ``offset`` output tokens precede it; ``finish_reason`` is set in the last one."""

    offset: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None


class Answer:
    """A request's tokens on their way to the client."""

    __slots__ = ("_decoded", "_detokenizer", "_finished", "_taken", "_text", "stream")

    def __init__(self, stream: TokenStream, detokenizer: Detokenizer) -> None:
        self.stream = stream
        self._detokenizer = detokenizer
        self._decoded = 0
        self._taken = 0
        self._text = ""
        self._finished = False

    @property
    def started(self) -> bool:
        """Whether the client has had tokens."""
        return self._taken > 0

    def find_stop(self) -> bool:
        """Whether the accepted tokens complete a stop string; the stream ends then. The instance says so itself, but
        one that died may not have come to it."""
        self._decode()
        return self._detokenizer.stopped

    def take(self) -> Piece | None:
        """What is new since the last piece; None when nothing is."""
        if self._finished:
            return None
        stream = self.stream
        self._decode()
        offset = self._taken
        finish_reason = stream.finish_reason
        token_ids = stream.token_ids[offset:]
        if not token_ids and finish_reason is None:
            return None
        self._taken = len(stream.token_ids)
        if finish_reason is not None:
            self._finished = True
            self._text += self._detokenizer.finish()
        text, self._text = self._text, ""
        return Piece(offset, token_ids, text, finish_reason)

    def _decode(self) -> None:
        token_ids = self.stream.token_ids
        if len(token_ids) == self._decoded:
            return
        text = self._detokenizer.feed(token_ids[self._decoded :])
        self._decoded = len(token_ids)
        self._text = self._text + text if self._text else text
        if self._detokenizer.stopped:
            # Whatever else ended it: the text ends here.
            self.stream.finish_reason = FinishReason.STOP
