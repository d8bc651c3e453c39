"""The compose files as compose reads them: variables filled in from .env, overrides merged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
BASE: Final = "docker-compose.yml"
OVERRIDES: Final = ("docker-compose.gpu.yml", "docker-compose.tls.yml", "docker-compose.check.yml")
# The innermost of ${NAME}, ${NAME-default} and ${NAME:+other}; $$ stands for $.
_VARIABLE: Final = re.compile(r"(?<!\$)\$\{(\w+)(?:(-|:\+)([^${}]*))?\}")
Service = dict[str, Any]


def dotenv() -> dict[str, str]:
    """What .env sets."""
    lines = [line for line in (DEPLOY / ".env").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def variables(file: str) -> dict[str, bool]:
    """The variables that a compose file uses, and whether each can do without .env."""
    used: dict[str, bool] = {}
    for name, operator in re.findall(r"(?<!\$)\$\{(\w+)(:?[-+])?", (DEPLOY / file).read_text()):
        used[name] = bool(operator) and used.get(name, True)
    return used


def read(file: str, environment: dict[str, str]) -> dict[str, Any]:
    """A compose file with its variables filled in."""
    text = (DEPLOY / file).read_text()

    def fill(match: re.Match[str]) -> str:
        name, operator, word = match.groups()
        if operator == ":+":
            return str(word) if environment.get(name) else ""
        return environment.get(name, word or "")

    while (filled := _VARIABLE.sub(fill, text)) != text:
        text = filled
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def services(*files: str) -> dict[str, Service]:
    """The services of the base file with ``files`` on top. Mappings are merged, volumes come together, the rest is
    replaced, as compose does."""
    merged: dict[str, Service] = {}
    for file in (BASE, *files):
        for name, service in read(file, dotenv())["services"].items():
            merged[name] = _merge(merged.get(name, {}), service)
    return merged


def _merge(below: Service, above: Service) -> Service:
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            result[key] = _merge(below[key], value)
        elif key == "volumes" and key in below:
            result[key] = [*below[key], *(volume for volume in value if volume not in below[key])]
        else:
            result[key] = value
    return result
