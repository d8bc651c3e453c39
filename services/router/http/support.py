"""Marks for fields of OpenAI's API that are not honoured here: taken without effect, or refused.

docs/openai.md lists them from here; a test holds it to that.
"""

from __future__ import annotations

from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Ignored:
    """A field that changes nothing about the answer and is taken as it comes."""


class Refused:
    """A field that asks for what there is not: only null is taken, and ``neutral`` values, which ask for nothing."""

    def __init__(self, *neutral: object, why: str) -> None:
        self.neutral = neutral
        self.why = why

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: object) -> object:
        if value is not None and value not in self.neutral:
            raise PydanticCustomError("unsupported", "is not supported here: {why}; leave it out", {"why": self.why})
        return value
