"""docs/openai.md says of every field what becomes of it: held to the models, so that neither drifts."""

from __future__ import annotations

import json
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from services.router.http.chat_request import ChatRequest, Message
from services.router.http.completion_request import CompletionRequest
from services.router.http.fields import StreamOptions
from services.router.http.support import Ignored, Refused

pytestmark = pytest.mark.fast

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"


def table(model: type[BaseModel]) -> str:
    """The page's table of a model's fields: first those that are honoured, then the others."""
    rows: dict[str, list[str]] = {"yes": [], "no effect": [], "refused": []}
    hints = typing.get_type_hints(model, include_extras=True)
    for name, field in model.model_fields.items():
        marks = getattr(hints[name], "__metadata__", ())
        refused = next((mark for mark in marks if isinstance(mark, Refused)), None)
        support = "refused" if refused else "no effect" if any(isinstance(mark, Ignored) for mark in marks) else "yes"
        meaning = field.description or ""
        if refused is not None:
            taken = " or ".join(f"`{json.dumps(value)}`" for value in (None, *refused.neutral))
            meaning = f"only {taken}: {refused.why}"
        assert meaning or support == "no effect", f"{name} says nothing of itself"
        rows[support].append(f"| `{name}` | {support} | {meaning} |")
    return "\n".join(["| field | | |", "|---|---|---|", *rows["yes"], *rows["no effect"], *rows["refused"]])


@pytest.mark.parametrize("model", [ChatRequest, Message, StreamOptions, CompletionRequest])
def test_the_page_has_the_models_fields(model: type[BaseModel]) -> None:
    expected = table(model)
    assert expected in PAGE.read_text(), f"docs/openai.md must have this table:\n{expected}"
