"""A page in a real browser, which complains of nothing and asks nobody but its own origin.

The browser is the system's Chromium (Debian: apt-get install chromium); without one, tests that need it are skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from playwright.async_api import Page, async_playwright

WAIT_MS = 60_000
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Visit:
    """An open page, what it has complained of and all that it has asked for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def check(self, origin: str) -> None:
        """Demand that it was content with what ``origin`` has, and asked for nothing else."""
        assert self.complaints == []
        assert self.urls
        assert [url for url in self.urls if not url.startswith((f"{origin}/", "data:"))] == []


@asynccontextmanager
async def visit(
    url: str,
    *,
    width: int = 1280,
    height: int = 800,
    scheme: Literal["light", "dark"] = "light",
    **options: Any,
) -> AsyncIterator[Visit]:
    """Open ``url``. Skips the test where there is no browser."""
    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        pytest.skip(f"no browser: install Chromium as one of {', '.join(_NAMES)}")
    async with async_playwright() as playwright:
        # In a container Chromium's own sandbox is often not allowed; the page is ours.
        browser = await playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        try:
            page = await browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
            page.set_default_timeout(WAIT_MS)
            seen = Visit(page)
            page.on("console", lambda said: seen.complaints.append(f"{said.type}: {said.text}"))
            page.on("pageerror", lambda error: seen.complaints.append(str(error)))
            page.on("request", lambda request: seen.urls.append(request.url))
            await page.goto(url)
            yield seen
        finally:
            await browser.close()
