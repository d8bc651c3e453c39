"""The API reference says what the protos say, and every declaration in them is explained."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "protos" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(reference: ModuleType) -> None:
    expected = reference.page(reference.read_protos())
    assert (ROOT / "docs" / "api.md").read_text() == expected, "run `python protos/reference.py` and commit docs/api.md"


def test_every_declaration_is_explained(reference: ModuleType) -> None:
    """In the page's own words: no section and no row without a text."""
    unexplained = []
    lines = reference.page(reference.read_protos()).splitlines()
    for number, line in enumerate(lines):
        heading = line.startswith("### ")
        if (heading and not lines[number + 2].strip()) or (line.startswith("| `") and line.endswith("|  |")):
            unexplained.append(line)
    assert unexplained == []


def test_every_link_leads_somewhere(reference: ModuleType) -> None:
    text = reference.page(reference.read_protos())
    anchors = {
        re.sub(r"[^a-z0-9_-]", "", line.lstrip("# ").lower()) for line in text.splitlines() if line.startswith("#")
    }
    assert set(re.findall(r"\(#([^)]+)\)", text)) <= anchors
