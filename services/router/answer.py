"""What the client gets of one request: its accepted tokens as pieces of tokens and text. Pure.

Owns the place up to which tokens have been turned into text and given out. A piece is made when the client can take
one, so tokens that come while it cannot are simply part of the next piece: what waits for a slow client is bounded by
the request's ``max_output_tokens``, and a fast one pays for each piece once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

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


class Piece(NamedTuple):
    """New tokens and new text. ``offset`` output tokens precede it; ``finish_reason`` is set in the last one."""

    offset: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None


class Answer:
    """A request's tokens on their way to one client.

    The text of all pieces up to a token is what the tokens up to there make final, however they were grouped: so an
    answer may go on from any token, with a detokenizer that has seen those before.
    """

    __slots__ = ("_decoded", "_detokenizer", "_finished", "_offset", "_taken", "_text", "stream")

    def __init__(self, stream: TokenStream, detokenizer: Detokenizer, *, offset: int = 0) -> None:
        """``detokenizer`` has been fed the ``offset`` tokens that the client has, and their text is dropped."""
        self.stream = stream
        self._detokenizer = detokenizer
        self._offset = offset
        self._decoded = offset
        self._taken = offset
        self._text = ""
        self._finished = False
        if detokenizer.stopped:
            stream.finish_reason = FinishReason.STOP

    @property
    def started(self) -> bool:
        """Whether the client has had tokens of this answer."""
        return self._taken > self._offset

    def find_stop(self) -> bool:
        """Whether the accepted tokens complete a stop string; the stream ends then. The instance says so itself, but
        one that died may not have come to it."""
        self._decode()
        return self._detokenizer.stopped

    def take(self) -> Piece | None:
        """What is new since the last piece; None when nothing is."""
        stream = self.stream
        taken = self._taken
        token_ids = stream.token_ids[taken:]
        if self._decoded == taken:
            self._feed(token_ids)
        else:
            self._decode()
        finish_reason = stream.finish_reason
        if not token_ids and (finish_reason is None or self._finished):
            return None
        self._taken = taken + len(token_ids)
        text, self._text = self._text, ""
        if finish_reason is not None:
            self._finished = True
            text += self._detokenizer.finish()
        return Piece(taken, token_ids, text, finish_reason)

    def _decode(self) -> None:
        """Turn what is accepted and not decoded yet into text."""
        self._feed(self.stream.token_ids[self._decoded :])

    def _feed(self, token_ids: list[int]) -> None:
        if not token_ids:
            return
        self._decoded += len(token_ids)
        self._text += self._detokenizer.feed(token_ids)
        if self._detokenizer.stopped:
            # Whatever else ended it: the text ends here.
            self.stream.finish_reason = FinishReason.STOP
