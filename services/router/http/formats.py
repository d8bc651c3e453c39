"""How pieces of answers look: the events of a stream, and the whole, for chat and for text completions.

The events are put together from text, a token each: through models and a dictionary they would take some ten times as
long. A test holds them to the models of ``answers``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from pydantic import BaseModel

from services.router.http.answers import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    Usage,
)
from services.router.http.fields import FinishReason
from starmesh import types

DONE: Final = b"data: [DONE]\n\n"
# To ASCII: clients that split lines as Python does would break at U+2028 and its like.
_quote: Final = json.encoder.encode_basestring_ascii
_REASONS: Final[dict[types.FinishReason, FinishReason]] = {
    types.FinishReason.STOP: "stop",
    types.FinishReason.LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """What all events of an answer say. ``created``: seconds since 1970."""

    request_id: str
    created: int
    model: str
    fingerprint: str


class Whole(NamedTuple):
    """One finished choice."""

    text: str
    finish_reason: types.FinishReason


class Format(Protocol):
    """One API's way to say it."""

    def opening(self, index: int) -> str:
        """Events before the first text of a choice."""
        ...

    def text(self, index: int, text: str) -> str:
        """The event for new text."""
        ...

    def ending(self, index: int, reason: types.FinishReason) -> str:
        """The event that ends a choice."""
        ...

    def usage(self, usage: Usage) -> str:
        """The event with the usage."""
        ...

    def whole(self, choices: Sequence[Whole], usage: Usage) -> BaseModel:
        """The body of an answer that is not streamed."""
        ...


class _Events:
    """The part that both have in common."""

    def __init__(self, identity: Identity, *, prefix: str, kind: str, includes_usage: bool) -> None:
        self.identity = identity
        self.id = f"{prefix}{identity.request_id}"
        head = {
            "id": self.id,
            "object": kind,
            "created": identity.created,
            "model": identity.model,
            "system_fingerprint": identity.fingerprint,
        }
        self._head = f"data: {json.dumps(head, separators=(',', ':'))[:-1]}"
        self._tail = ',"usage":null}\n\n' if includes_usage else "}\n\n"

    def choice(self, index: int, content: str, finish_reason: str = "null") -> str:
        """An event with one choice; ``content`` and ``finish_reason`` are JSON."""
        return (
            f'{self._head},"choices":[{{"index":{index},{content},"logprobs":null,"finish_reason":{finish_reason}}}]'
            f"{self._tail}"
        )

    def usage(self, usage: Usage) -> str:
        """The event with the usage."""
        return f'{self._head},"choices":[],"usage":{usage.model_dump_json()}}}\n\n'


class ChatFormat:
    """Chat completions."""

    def __init__(self, identity: Identity, *, includes_usage: bool) -> None:
        self._events = _Events(
            identity, prefix="chatcmpl-", kind="chat.completion.chunk", includes_usage=includes_usage
        )

    def opening(self, index: int) -> str:
        """The role."""
        return self._events.choice(index, '"delta":{"role":"assistant","content":""}')

    def text(self, index: int, text: str) -> str:
        """A delta of the content."""
        return self._events.choice(index, f'"delta":{{"content":{_quote(text)}}}')

    def ending(self, index: int, reason: types.FinishReason) -> str:
        """The finish reason."""
        return self._events.choice(index, '"delta":{}', f'"{_REASONS[reason]}"')

    def usage(self, usage: Usage) -> str:
        """The usage."""
        return self._events.usage(usage)

    def whole(self, choices: Sequence[Whole], usage: Usage) -> ChatCompletion:
        """All of it."""
        identity = self._events.identity
        return ChatCompletion(
            id=self._events.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.fingerprint,
            choices=[
                ChatChoice(
                    index=index,
                    message=AnswerMessage(content=choice.text),
                    finish_reason=_REASONS[choice.finish_reason],
                )
                for index, choice in enumerate(choices)
            ],
            usage=usage,
        )


class CompletionFormat:
    """Text completions."""

    def __init__(self, identity: Identity, *, includes_usage: bool) -> None:
        self._events = _Events(identity, prefix="cmpl-", kind="text_completion", includes_usage=includes_usage)

    def opening(self, index: int) -> str:
        """Nothing: there are no roles."""
        return ""

    def text(self, index: int, text: str) -> str:
        """More text."""
        return self._events.choice(index, f'"text":{_quote(text)}')

    def ending(self, index: int, reason: types.FinishReason) -> str:
        """The finish reason."""
        return self._events.choice(index, '"text":""', f'"{_REASONS[reason]}"')

    def usage(self, usage: Usage) -> str:
        """The usage."""
        return self._events.usage(usage)

    def whole(self, choices: Sequence[Whole], usage: Usage) -> Completion:
        """All of it."""
        identity = self._events.identity
        return Completion(
            id=self._events.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.fingerprint,
            choices=[
                CompletionChoice(index=index, text=choice.text, finish_reason=_REASONS[choice.finish_reason])
                for index, choice in enumerate(choices)
            ],
            usage=usage,
        )
