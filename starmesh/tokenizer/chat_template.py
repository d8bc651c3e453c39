"""A model's chat template: a conversation to the text that the model was trained on.

Templates are Jinja programs that come with a model, so they run in a sandbox. The names that they may use are those
of transformers' ``apply_chat_template``; a test holds the two equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(ValueError):
    """A conversation cannot be rendered; the message is fit for the client."""


class ChatTemplate:
    """A compiled template together with the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate | None:
        """The template of a model's directory, or None when it has none.

        A file of its own takes precedence over ``tokenizer_config.json``, where older models keep it.
        """
        config_path = directory / "tokenizer_config.json"
        config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        if (path := directory / "chat_template.jinja").is_file():
            source: Any = path.read_text(encoding="utf-8")
        elif (path := directory / "chat_template.json").is_file():
            source = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
        else:
            source = config.get("chat_template")
        if isinstance(source, list):  # several by name: [{"name": "default", "template": ...}, ...]
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            return None
        tokens = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name)}
        return cls(source, {name: t["content"] if isinstance(t, dict) else t for name, t in tokens.items()})

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text up to where the model's answer begins. Raises ChatTemplateError when the template refuses."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses the conversation: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks answers for training; for serving it is its content."""

    tags = {"generation"}  # noqa: RUF012 -- an instance variable in Jinja's stubs

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which a model never saw.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
