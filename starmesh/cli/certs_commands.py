"""``starmesh certs``: a CA and certificates for mutual TLS. What they do is in ``certs``, imported when they run."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from starmesh.cli.run import CliError, fail

certs_app = typer.Typer(help="Make certificates for TLS.", no_args_is_help=True)

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Out = Annotated[Path, typer.Option(metavar="DIR", help="Directory of the files; made if it is not there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]


@certs_app.command()
def init(
    *,
    out: Out,
    name: Annotated[str, typer.Option(help="Name of the CA.")] = "starmesh CA",
    days: Annotated[int, typer.Option(min=1, max=36_500, help="Days that the CA is valid.")] = 3650,
    overwrite: Overwrite = False,
) -> None:
    """Make a CA: ca.crt, which every service and client gets, and ca.key, which stays here."""
    from starmesh.cli.certs import Authority

    try:
        written = Authority.make(name, lifetime=timedelta(days=days)).write(out, overwrite=overwrite)
    except CliError as error:
        fail(str(error))
    print(f"{written}; keep {out / 'ca.key'} off the machines that serve: whoever has it can join the mesh")


@certs_app.command()
def issue(
    *,
    name: Annotated[str, typer.Argument(help="Name of the certificate and its files, such as router.")],
    out: Out,
    ca: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory of the CA. (default: that of --out)")
    ] = None,
    san: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="DNS name or IP address that clients reach it by; may be repeated."),
    ] = None,
    server_name: Annotated[
        str, typer.Option(help="Name that services know each other by: their --tls-server-name.")
    ] = "starmesh.internal",
    days: Annotated[int, typer.Option(min=1, max=3650, help="Days that it is valid.")] = 90,
    overwrite: Overwrite = False,
) -> None:
    """Make a certificate for a service: NAME.crt and NAME.key. A router's needs each --san that clients use."""
    from starmesh.cli.certs import Authority

    if not _FILE_NAME.fullmatch(name):
        raise typer.BadParameter("use letters, digits, dots, dashes and underscores", param_hint="NAME")
    if name == "ca":
        raise typer.BadParameter("ca.crt and ca.key are the CA's own files; use another", param_hint="NAME")
    names = tuple(dict.fromkeys([server_name, *(san or ())]))
    try:
        files = Authority.open(ca or out).issue(
            name, out, lifetime=timedelta(days=days), names=names, overwrite=overwrite
        )
    except CliError as error:
        fail(str(error))
    print(f"--tls-cert {files.cert} --tls-key {files.key} --tls-ca {files.ca}")
