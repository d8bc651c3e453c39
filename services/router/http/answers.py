"""What is sent back when an answer is whole, in OpenAI's shapes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from services.router.http.fields import FinishReason


class PromptTokensDetails(BaseModel):
    """More about the prompt's tokens."""

    cached_tokens: int = Field(description="Prompt tokens whose KV was found in the prefix cache.")


class Usage(BaseModel):
    """Counts tokens. A prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Identifies the weights.")
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason


class Completion(BaseModel):
    """The continuations of one prompt or several."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(description="Seconds since 1970.")
    model: str
    system_fingerprint: str = Field(description="Identifies the weights.")
    choices: list[CompletionChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new of a message; the first one of a choice has the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """What is new of one answer."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = Field(description="Set in the last chunk of a choice, whose delta is empty.")


class ChatCompletionChunk(BaseModel):
    """One event of a streamed chat completion. The stream ends with the event ``[DONE]``; an error is an event too."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice] = Field(description="One; none in the chunk with the usage.")
    usage: Usage | None = Field(None, description="With stream_options.include_usage: null in all chunks but the last.")


class ChunkedCompletionChoice(BaseModel):
    """What is new of one continuation."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class CompletionChunk(BaseModel):
    """One event of a streamed completion. The stream ends with the event ``[DONE]``; an error is an event too."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkedCompletionChoice] = Field(description="One; none in the chunk with the usage.")
    usage: Usage | None = Field(None, description="With stream_options.include_usage: null in all chunks but the last.")
