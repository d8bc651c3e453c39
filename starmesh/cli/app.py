"""The ``starmesh`` command: its tree of commands."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated

import typer

from starmesh.cli import (
    compare_command,
    local_commands,
    profile_command,
    router_commands,
    simulate_command,
    top_command,
)
from starmesh.cli.certs_commands import certs_app
from starmesh.cli.keys_commands import keys_app
from starmesh.cli.predictor_commands import predictor_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
model_app = typer.Typer(help="Get models.", no_args_is_help=True)

for command in (
    local_commands.up,
    router_commands.generate,
    router_commands.status,
    top_command.top,
    router_commands.drain,
    router_commands.migrate,
    router_commands.bench,
    compare_command.compare,
    local_commands.demo,
    profile_command.profile,
    simulate_command.simulate,
):
    app.command()(command)
model_app.command()(local_commands.fetch)
app.add_typer(model_app, name="model")
app.add_typer(predictor_app, name="predictor")
app.add_typer(certs_app, name="certs")
app.add_typer(keys_app, name="keys")


def main() -> None:
    """Entry point of the console script."""
    # gRPC's own log lines, such as that a server said good-bye, are not for the terminal.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("starmesh"))
        raise typer.Exit


@app.callback()
def starmesh(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve language models with prefill and decode on separate instances."""
