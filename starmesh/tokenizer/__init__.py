"""Text to tokens and back, for router and engine alike.

Owns the model's tokenizer, its chat template and the incremental way back to text. Reads only the JSON files of a
model's directory; imports neither torch nor transformers, whose AutoTokenizer gives the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from starmesh.tokenizer.chat_template import ChatTemplate, ChatTemplateError
from starmesh.tokenizer.detokenizer import IncrementalDetokenizer, StopMatcher

__all__ = ["ChatTemplateError", "IncrementalDetokenizer", "ModelTokenizer", "StopMatcher"]


class ModelTokenizer:
    """The tokenizer of one model. Immutable: may be used from several threads at once."""

    def __init__(
        self,
        backend: Tokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        eos_token_ids: tuple[int, ...] = (),
        vocabulary_tokens: int | None = None,
        context_tokens: int | None = None,
    ) -> None:
        # A tokenizer.json may keep the truncation and padding of its training.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = eos_token_ids
        self.vocabulary_tokens = vocabulary_tokens or backend.get_vocab_size(with_added_tokens=True)
        """Rows of the embedding: every id below it can be fed to the model, though some may stand for no text."""
        self.context_tokens = context_tokens
        """The model's limit of prompt and output tokens together; None when its configuration names none."""
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        """Tokens that are no text, such as the end of the sequence."""
        self.byte_token_ids = frozenset(
            token_id for byte in range(256) if (token_id := backend.token_to_id(f"<0x{byte:02X}>")) is not None
        )
        """Tokens that stand for one byte each, in vocabularies that fall back to bytes."""
        self._chat_template = chat_template

    @classmethod
    def load(cls, directory: Path) -> ModelTokenizer:
        """Load from a model's directory. Raises FileNotFoundError without ``config.json`` or ``tokenizer.json``."""
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = {**config, **config.get("text_config", {})}  # multimodal models nest the language model's
        generation = _read_json(directory / "generation_config.json")
        return cls(
            Tokenizer.from_str((directory / "tokenizer.json").read_text(encoding="utf-8")),
            chat_template=ChatTemplate.load(directory),
            eos_token_ids=_token_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
            vocabulary_tokens=config.get("vocab_size"),
            context_tokens=config.get("max_position_embeddings"),
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether ``encode_chat`` works."""
        return self._chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with the special tokens that the model expects around it (such as BOS)."""
        return self.backend.encode(text).ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation of ``{"role": ..., "content": ...}``, up to where the answer begins.

        Raises ChatTemplateError when the model has no template or its template refuses the conversation.
        """
        if self._chat_template is None:
            raise ChatTemplateError("this model has no chat template; send text instead")
        # The template writes the special tokens itself.
        return self.backend.encode(self._chat_template.render(messages), add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ``token_ids`` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(token_ids, skip_special_tokens=True)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
