"""``starmesh predictor``: its commands, their options and help.

What they do is in the modules beside this one, imported only when they run: ``--help`` loads neither gRPC nor numpy.
"""

from __future__ import annotations

from typing import Annotated

import typer

from starmesh.cli import options
from starmesh.cli.options import DEFAULT_ADDRESS
from starmesh.cli.run import run

predictor_app = typer.Typer(help="Predict how many tokens requests still have to generate.", no_args_is_help=True)


@predictor_app.command()
def status(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
) -> None:
    """Show which predictor answers, and how well it does by its requests' progress."""
    from rich.console import Console

    from starmesh.cli import predictor_status as views
    from starmesh.cli.router import connect

    async def command() -> None:
        async with connect(address) as router:
            if as_json:
                print(await views.predictor_json(router))
            else:
                await views.show_predictor(router, Console())

    run(command(), address=address)


@predictor_app.command()
def promote(
    version: Annotated[str, typer.Argument(help="A version that `starmesh predictor status` lists.")],
    address: options.Address = DEFAULT_ADDRESS,
) -> None:
    """Have another version of the predictor answer from now on, without a restart."""
    from rich.console import Console

    from starmesh.cli import predictor_status as views
    from starmesh.cli.router import connect

    async def command() -> None:
        async with connect(address) as router:
            await views.promote(router, version, Console())

    run(command(), address=address)
