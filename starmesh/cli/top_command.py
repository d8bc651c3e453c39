"""``starmesh top``: its options and help. What it does is in ``top``, imported only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from starmesh.cli import options
from starmesh.cli.login import ApiKeyFile, TlsCa, read_login
from starmesh.cli.options import DEFAULT_ADDRESS
from starmesh.cli.run import run


def top(
    *,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end; for pipes.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between frames.")] = 1.0,
    address: options.Address = DEFAULT_ADDRESS,
    tls_ca: TlsCa = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Watch a cluster fill the terminal: instances, latencies, moves and why they were made. q quits."""
    from rich.console import Console

    from starmesh.cli import top as views
    from starmesh.cli.router import connect

    login = read_login(tls_ca, api_key_file)

    async def command() -> None:
        async with connect(address, login) as router:
            if once:
                await views.show_once(router, Console())
            else:
                await views.show_top(router, Console(), interval_s=interval)

    run(command(), address=address)
