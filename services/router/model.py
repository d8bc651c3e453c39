"""The served model as the router knows it: its tokenizer and the facts that limit a request.

Owns tokenising off the event loop where it takes long. Owns no weights: the router never loads them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from services.router.validation import ModelFacts, input_field
from starmesh.emulation.emulation import Emulation
from starmesh.emulation.tokenizer import EmulatedTokenizer
from starmesh.model_files import model_name, model_revision
from starmesh.rpc.status import bad_field
from starmesh.tokenizer import ChatTemplateError, IncrementalDetokenizer, ModelTokenizer
from starmesh.types import ClusterView, Role
from starmesh.v1 import inference_pb2

# Tokenising runs at some 2 to 5 MB/s: this much takes about as long as handing it to a thread.
_INLINE_TEXT_BYTES = 2048
# Back to text it takes some 0.6 us a token.
_INLINE_TOKENS = 2048


class ServedModel:
    """One model's text side."""

    def __init__(self, *, name: str, revision: str, tokenizer: ModelTokenizer) -> None:
        self.name = name
        self.revision = revision
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(tokenizer.eos_token_ids)

    @classmethod
    def load(cls, directory: Path) -> ServedModel:
        """Load from a model's directory. Blocking."""
        return cls(
            name=model_name(directory),
            revision=model_revision(directory),
            tokenizer=ModelTokenizer.load(directory),
        )

    @classmethod
    def emulated(cls, emulation: Emulation, *, lengths: str) -> ServedModel:
        """What stands for a model where none runs, called as its profile; ``lengths`` names how long answers are."""
        profile = emulation.profile
        return cls(
            name=profile.name,
            revision=emulation.layout.model_revision,
            tokenizer=EmulatedTokenizer(context_tokens=profile.max_sequence_tokens, lengths=lengths),
        )

    def facts(self, view: ClusterView) -> ModelFacts:
        """The facts as of ``view``: the context is the smallest of the model's and of every instance's, so that a
        request that is accepted fits wherever it may have to go on."""
        limits = [
            instance.info.max_sequence_tokens
            for instance in view.instances
            if instance.info.role in (Role.PREFILL, Role.DECODE) and instance.info.max_sequence_tokens > 0
        ]
        if self._tokenizer.context_tokens:
            limits.append(self._tokenizer.context_tokens)
        return ModelFacts(
            name=self.name,
            # A model without a limit whose instances are not up yet: nothing can be refused for its length.
            context_tokens=min(limits, default=2**31 - 1),
            vocabulary_tokens=self._tokenizer.vocabulary_tokens,
            eos_token_ids=self._eos_token_ids,
            has_chat_template=self._tokenizer.has_chat_template,
        )

    def detokenizer(self, stop_strings: tuple[str, ...]) -> IncrementalDetokenizer:
        """A new detokenizer for one answer."""
        return IncrementalDetokenizer(self._tokenizer, stop_strings)

    async def detokenizer_after(
        self, stop_strings: tuple[str, ...], token_ids: Sequence[int]
    ) -> IncrementalDetokenizer:
        """One that has been fed ``token_ids``, whose text is dropped."""
        detokenizer = self.detokenizer(stop_strings)
        if len(token_ids) <= _INLINE_TOKENS:
            detokenizer.feed(token_ids)
        else:
            await asyncio.to_thread(detokenizer.feed, token_ids)
        return detokenizer

    async def tokenize(self, request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        """The prompt's tokens. Raises StatusError when the chat template refuses the conversation."""
        if request.WhichOneof("input") == "token_ids":
            return tuple(request.token_ids.token_ids)
        try:
            if request.ByteSize() <= _INLINE_TEXT_BYTES:
                return self._encode(request)
            return await asyncio.to_thread(self._encode, request)
        except ChatTemplateError as error:
            raise bad_field(input_field(request), str(error)) from None

    def _encode(self, request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        if request.WhichOneof("input") == "text":
            return tuple(self._tokenizer.encode(request.text))
        messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
        return tuple(self._tokenizer.encode_chat(messages))
