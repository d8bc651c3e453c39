"""Tokens back to text, a few at a time.

Owns when text is final: a character whose bytes come in several tokens is not until the last of them, and text that
may begin a stop string is not until it has turned out otherwise. Engine and router run this same code, so that they
agree on the token that completes a stop string. An object belongs to one sequence and to one thread at a time.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from tokenizers.decoders import ByteLevel

if TYPE_CHECKING:
    from starmesh.tokenizer import ModelTokenizer


class IncrementalDetokenizer:
    """Gives the text of a growing sequence in pieces.

    The pieces together equal ``ModelTokenizer.decode`` of all tokens, cut before the first stop string: the one that
    is complete first, however the tokens were grouped into calls.
    """

    def __init__(self, tokenizer: ModelTokenizer, stop_strings: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether a stop string is complete; no more text comes then."""
        self._decoder = _text_decoder(tokenizer)
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def feed(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that they make final."""
        return "" if self.stopped else self._release(self._decoder.feed(token_ids), last=False)

    def finish(self) -> str:
        """Return what was held back, now that no token follows. Incomplete characters become U+FFFD."""
        return "" if self.stopped else self._release(self._decoder.finish(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if ends:
            self.stopped = True
            keep = min(ends)[1]
        else:
            keep = len(text) if last else len(text) - self._possible_stop(text)
        self._held = "" if self.stopped else text[keep:]
        return text[:keep]

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string may begin."""
        longest = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class StopMatcher:
    """Tells an engine at which token a stop string is complete."""

    def __init__(self, tokenizer: ModelTokenizer, stop_strings: Sequence[str]) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, stop_strings) if stop_strings else None

    def feed(self, token_id: int) -> bool:
        """Take the next output token; return whether a stop string is complete with it or was before."""
        if self._detokenizer is None:
            return False
        self._detokenizer.feed((token_id,))
        return self._detokenizer.stopped


class _TextDecoder(Protocol):
    """Tokens to text, without a thought of stop strings."""

    def feed(self, token_ids: Iterable[int]) -> str:
        """Take tokens; return the text that no later token can change."""
        ...

    def finish(self) -> str:
        """Return the rest."""
        ...


class _ByteLevelDecoder:
    """For vocabularies of bytes (GPT-2, Llama 3, Qwen, SmolLM2): linear, whatever the tokens.

    Python's and the tokenizer's UTF-8 decoders replace ill-formed bytes alike: U+FFFD for each maximal subpart.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Iterable[int]) -> str:
        special, backend = self._tokenizer.special_token_ids, self._tokenizer.backend
        tokens = (backend.id_to_token(token_id) or "" for token_id in token_ids if token_id not in special)
        return self._utf8.decode(b"".join(map(_token_bytes, tokens)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For all other vocabularies (Llama 2, Mistral, Gemma): decodes the new tokens behind the last final ones.

    Those before them are context, for decoders that treat the first token of a text differently. Tokens that stand
    for one byte each are held until the run ends, since one bad byte changes how all of a run is read.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._window: list[int] = []

    def feed(self, token_ids: Iterable[int]) -> str:
        # One by one, so that what is final does not depend on how tokens are grouped.
        return "".join(map(self._feed, token_ids))

    def _feed(self, token_id: int) -> str:
        tokenizer = self._tokenizer
        if token_id in tokenizer.special_token_ids or tokenizer.backend.id_to_token(token_id) is None:
            return ""  # not even the end of a run of bytes
        self._window.append(token_id)
        if token_id in tokenizer.byte_token_ids:
            return ""
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # perhaps a character that the next token completes
            return ""
        self._context, self._window = self._window, []
        self._context_text = self._tokenizer.decode(self._context)
        return text

    def finish(self) -> str:
        return self._text()

    def _text(self) -> str:
        return self._tokenizer.decode(self._context + self._window)[len(self._context_text) :]


def _text_decoder(tokenizer: ModelTokenizer) -> _TextDecoder:
    byte_level = isinstance(tokenizer.backend.decoder, ByteLevel)
    return _ByteLevelDecoder(tokenizer) if byte_level else _WindowDecoder(tokenizer)


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's printable stand-ins for bytes: itself for a printable Latin-1 byte, U+0100 onwards for the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: byte for byte in printable}, **{0x100 + n: byte for n, byte in enumerate(others)}}


_ALPHABET: Final = _byte_alphabet()


@functools.lru_cache(maxsize=1 << 16)
def _token_bytes(token: str) -> bytes:
    """The bytes of a token; of one that is not made of stand-ins (an added token), its UTF-8."""
    try:
        return bytes(_ALPHABET[ord(character)] for character in token)
    except KeyError:
        return token.encode()
