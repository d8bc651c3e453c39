"""The live page: one document that needs nothing else, no build step, no other file, no other origin.

Owns how its parts become one document and what a browser may do with it: run this very script, use this very style, and
ask its own origin. The script has no way to make HTML of a string (Trusted Types are demanded and there is no policy):
what comes from clients, as request ids do, can only ever be text.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Final

_PARTS: Final = Path(__file__).parent
_SCRIPTS: Final = ("format.js", "stream.js", "cards.js", "cluster.js", "lanes.js", "tiles.js", "logs.js", "main.js")
"""In an order in which each uses only those before it; they share one scope, closed to the outside."""


def _read(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_STYLE: Final = _read("page.css")
_SCRIPT: Final = '"use strict";\n(() => {\n' + "\n".join(map(_read, _SCRIPTS)) + "})();\n"

PAGE: Final = _read("page.html").replace("/* style */", _STYLE).replace("/* script */", _SCRIPT)

PAGE_HEADERS: Final = {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_source(_SCRIPT)}",
            f"style-src {_source(_STYLE)}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
