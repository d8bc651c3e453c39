"""The body of POST /v1/completions, and what it asks of the router."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final

from pydantic import Discriminator, Field, Tag

from services.router.http.errors import invalid
from services.router.http.fields import MAX_CHOICES, GenerationFields, Int32
from services.router.http.support import Refused
from starmesh.v1 import inference_pb2

DEFAULT_MAX_TOKENS: Final = 16
"""OpenAI's."""


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, str):
        return "<texts>"
    return "<tokens>" if isinstance(first, int) else "<lists of tokens>" if isinstance(first, list) else None


_Tokens = Annotated[list[Int32], Field(fail_fast=True)]
_Batch = Field(max_length=MAX_CHOICES, fail_fast=True)
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], _Batch, Tag("<texts>")]
    | Annotated[_Tokens, Tag("<tokens>")]
    | Annotated[list[_Tokens], _Batch, Tag("<lists of tokens>")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="should be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]


class CompletionRequest(GenerationFields):
    """What to continue, and how."""

    prompt: Prompt = Field(description="Text or token ids to continue, or up to 16 of either.")
    max_tokens: Int32 | None = Field(None, description=f"Limits each answer. Default {DEFAULT_MAX_TOKENS}.")
    logprobs: Annotated[int | None, Refused(why="the engine keeps no log probabilities")] = None
    echo: Annotated[bool | None, Refused(False, why="the prompt is not sent back")] = None
    suffix: Annotated[str | None, Refused("", why="the model does not insert")] = None
    best_of: Annotated[int | None, Refused(1, why="the engine keeps no log probabilities to choose by")] = None

    params: ClassVar[dict[str, str]] = {
        "sampling.max_output_tokens": "max_tokens",
        "text": "prompt",
        "token_ids.token_ids": "prompt",
    }

    def count(self) -> int:
        count = len(self._prompts()) * self.choices
        if count > MAX_CHOICES:
            raise invalid("n", f"asks for {count} answers with these prompts; {MAX_CHOICES} at most")
        return count

    def requests(self) -> list[inference_pb2.GenerateRequest]:
        """A request to the router for each choice, without ids: all of the first prompt, then all of the second, and so
        on, as OpenAI numbers them."""
        prompts = self._prompts()
        limit = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        requests = []
        for prompt in prompts:
            for choice in range(self.choices):
                request = self.base_request(choice=choice, max_output_tokens=limit)
                if isinstance(prompt, str):
                    request.text = prompt
                else:
                    request.token_ids.token_ids.extend(prompt)
                requests.append(request)
        return requests

    def _prompts(self) -> list[str] | list[list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        # Its first element says which list it is.
        if isinstance(prompt[0], int):
            return [prompt]
        return prompt
