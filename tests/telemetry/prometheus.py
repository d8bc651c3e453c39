"""A real Prometheus beside a test, where Debian's package or another has installed one."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

CONFIG = """
global: {{ scrape_interval: 1s }}
scrape_configs:
  - job_name: starmesh
    file_sd_configs: [{{ files: [{targets}], refresh_interval: 1s }}]
"""


class Prometheus:
    """Made by ``running_prometheus``."""

    def __init__(self, address: str, targets: Path) -> None:
        self._address = address
        self._targets = targets

    def scrape(self, pages: Iterable[tuple[str, str]]) -> None:
        """Scrape these from now on: roles, and URLs of pages."""
        found = [{"targets": [urllib.parse.urlsplit(url).netloc], "labels": {"job": role}} for role, url in pages]
        new = self._targets.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.rename(self._targets)

    async def query(self, expr: str) -> list[Any]:
        """The series that an expression has now. Raises HTTPError for one that is not understood."""
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        answer = await asyncio.to_thread(_read, url)
        found: list[Any] = json.loads(answer)["data"]["result"]
        return found

    async def ready(self) -> None:
        """Return when it serves."""
        while True:
            try:
                await asyncio.to_thread(_read, f"http://{self._address}/-/ready")
            except OSError:
                await asyncio.sleep(0.1)
            else:
                return


@asynccontextmanager
async def running_prometheus(directory: Path) -> AsyncIterator[Prometheus | None]:
    """One that scrapes nothing yet; None where none is installed."""
    program = shutil.which("prometheus")
    if program is None:
        yield None
        return
    targets, config = directory / "targets.json", directory / "prometheus.yml"
    config.write_text(CONFIG.format(targets=targets))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = (f"--config.file={config}", f"--storage.tsdb.path={directory / 'tsdb'}", f"--web.listen-address={address}")
    with (directory / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(program, *flags, stdout=log, stderr=log)
    try:
        made = Prometheus(address, targets)
        await asyncio.wait_for(made.ready(), 60)
        yield made
    finally:
        process.kill()
        await process.wait()


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        content: bytes = answer.read()
        return content
