"""The body of POST /v1/chat/completions, and what it asks of the router."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from services.router.http.fields import GenerationFields, Int32
from services.router.http.support import Ignored, Refused
from services.router.validation import MAX_CHAT_MESSAGES
from starmesh.v1 import inference_pb2


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


def _kind_of_content(value: Any) -> str | None:
    return "<string>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[TextPart], Field(max_length=MAX_CHAT_MESSAGES, fail_fast=True), Tag("<parts>")],
    Discriminator(
        _kind_of_content,
        custom_error_type="content_type",
        custom_error_message="should be a string or a list of parts of the type text",
    ),
]


class Message(BaseModel):
    """One message of the conversation. Further fields, such as those of an answer that is sent back, have no effect."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer counts as system.")
    content: Content = Field(description="The text; the texts of several parts are joined by line breaks.")
    name: Annotated[str | None, Ignored()] = None
    tool_calls: Annotated[Any, Refused([], why="there are no tools")] = None
    function_call: Annotated[Any, Refused(why="there are no tools")] = None
    audio: Annotated[Any, Refused(why="there is only text")] = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatRequest(GenerationFields):
    """What to answer, and how."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_CHAT_MESSAGES, fail_fast=True)] = Field(
        description="The conversation, oldest message first."
    )
    max_completion_tokens: Int32 | None = Field(None, description="Limits the answer. Default: as many as fit.")
    max_tokens: Int32 | None = Field(None, description="The former name of max_completion_tokens.")
    logprobs: Annotated[bool | None, Refused(False, why="the engine keeps no log probabilities")] = None
    top_logprobs: Annotated[Any, Refused(0, why="the engine keeps no log probabilities")] = None
    tools: Annotated[Any, Refused([], why="there are no tools")] = None
    tool_choice: Annotated[Any, Refused("none", "auto", why="there are no tools")] = None
    functions: Annotated[Any, Refused([], why="there are no tools")] = None
    function_call: Annotated[Any, Refused("none", "auto", why="there are no tools")] = None
    response_format: Annotated[Any, Refused({"type": "text"}, why="answers are free text")] = None
    modalities: Annotated[Any, Refused(["text"], why="answers are text")] = None
    audio: Annotated[Any, Refused(why="answers are text")] = None
    prediction: Annotated[Any, Refused(why="there are no predicted outputs")] = None
    web_search_options: Annotated[Any, Refused(why="there is no search")] = None
    reasoning_effort: Annotated[Any, Refused("none", why="the model cannot be told")] = None
    verbosity: Annotated[Any, Refused("medium", why="the model cannot be told")] = None
    parallel_tool_calls: Annotated[bool | None, Ignored()] = None
    store: Annotated[bool | None, Ignored()] = None
    metadata: Annotated[Any, Ignored()] = None
    service_tier: Annotated[str | None, Ignored()] = None
    safety_identifier: Annotated[str | None, Ignored()] = None
    prompt_cache_key: Annotated[str | None, Ignored()] = None
    prompt_cache_retention: Annotated[str | None, Ignored()] = None

    params: ClassVar[dict[str, str]] = {"chat": "messages", "chat.messages": "messages"}

    def param_of(self, field: str) -> str:
        """The client's name of a field of GenerateRequest."""
        if field == "sampling.max_output_tokens":
            return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return super().param_of(field)

    def requests(self) -> list[inference_pb2.GenerateRequest]:
        """A request to the router for each choice, without ids."""
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        chat = inference_pb2.Chat(
            messages=[
                inference_pb2.ChatMessage(
                    role="system" if message.role == "developer" else message.role, content=message.text
                )
                for message in self.messages
            ]
        )
        requests = []
        for choice in range(self.choices):
            request = self.base_request(choice=choice, max_output_tokens=limit)
            request.chat.CopyFrom(chat)
            requests.append(request)
        return requests
