"""The tokenizer of an emulated model: needs no files.

Owns the sizes of prompts: a token for each 4 bytes of text, about what real vocabularies need for English, unless the
text says how many it wants: ``emulate prompt_tokens=500 output_tokens=1234`` anywhere in it, the first part optional.
An output reads as the positions of its tokens, so that people see at once whether any is missing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Final
from zlib import crc32

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import WordLevel

from starmesh.emulation.lengths import draw_output_tokens
from starmesh.emulation.tokens import MAX_OUTPUT_TOKENS, VOCABULARY_TOKENS, length_token_id
from starmesh.engine.emulated import EOS_TOKEN_ID, FILLER_TOKEN_ID, FILLER_TOKENS
from starmesh.tokenizer import ModelTokenizer

_BYTES_PER_TOKEN: Final = 4
_SPECIAL: Final = ("<unknown>", "<begin>", "<end>")
_SPACE: Final = "\u0120"  # as byte-level vocabularies write it
_ASKED: Final = re.compile(r"\bemulate(?: prompt_tokens=(\d{1,7}))? output_tokens=(\d{1,7})\b")


class EmulatedTokenizer(ModelTokenizer):
    """``lengths`` names the length model for prompts that do not say how long their answers are."""

    def __init__(self, *, context_tokens: int, lengths: str) -> None:
        assert _SPECIAL[EOS_TOKEN_ID] == "<end>" and len(_SPECIAL) == FILLER_TOKEN_ID
        words = (f"{_SPACE}{number}" for number in range(FILLER_TOKENS))
        backend = Tokenizer(WordLevel({word: id_ for id_, word in enumerate([*_SPECIAL, *words])}, _SPECIAL[0]))
        backend.decoder = ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
        super().__init__(
            backend,
            eos_token_ids=(EOS_TOKEN_ID,),
            vocabulary_tokens=VOCABULARY_TOKENS,
            context_tokens=context_tokens,
        )
        self._context_tokens = context_tokens
        self._lengths = lengths

    @property
    def has_chat_template(self) -> bool:
        """Whether ``encode_chat`` works."""
        return True

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, the last of which says how long the answer will be. No more than one beyond the
        context are made, enough for the prompt to be refused: a few words can ask for millions."""
        content = text.encode()
        pieces = range(0, len(content), _BYTES_PER_TOKEN)[: self._context_tokens]
        prompt_tokens = len(pieces) + 1
        asked = _ASKED.findall(text)
        if asked:  # of a conversation the last one counts
            wanted, output = asked[-1]
            prompt_tokens = min(int(wanted), self._context_tokens + 1) if wanted else prompt_tokens
            output_tokens = int(output)
        else:
            output_tokens = draw_output_tokens(self._lengths, content)
        if prompt_tokens == len(pieces) + 1:
            filler = [_filler(crc32(content[at : at + _BYTES_PER_TOKEN])) for at in pieces]
        else:
            filler = filler_token_ids(max(0, prompt_tokens - 1), content)
        return [*filler, length_token_id(min(max(1, output_tokens), MAX_OUTPUT_TOKENS))]

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation of ``{"role": ..., "content": ...}``."""
        return self.encode("".join(f"{message['role']}: {message['content']}\n" for message in messages))


def filler_token_ids(count: int, key: bytes) -> list[int]:
    """``count`` tokens of a prompt that nobody has written: those of the same ``key`` begin alike, no others."""
    draw = random.Random(key)  # noqa: S311 - no secret
    return [_filler(number) for number in draw.choices(range(FILLER_TOKENS), k=count)]


def _filler(number: int) -> int:
    return FILLER_TOKEN_ID + number % FILLER_TOKENS
