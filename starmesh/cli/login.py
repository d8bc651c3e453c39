"""What a command shows a router, and knows it by: the mesh's CA and an API key. Imports nothing that takes time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from starmesh.cli.run import fail

KEY_VARIABLE: Final = "STARMESH_API_KEY"
_MAX_KEY_CHARS: Final = 256

TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        envvar="STARMESH_TLS_CA",
        metavar="FILE",
        help="CAs that sign the router's certificate. (default: plaintext)",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        envvar="STARMESH_API_KEY_FILE",
        metavar="FILE",
        help=f"File with the API key, if the router wants one. (default: {KEY_VARIABLE})",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Login:
    """Without ``ca`` the connection is plaintext; without ``api_key`` no key is sent."""

    ca: Path | None = None
    api_key: str = ""

    def __repr__(self) -> str:
        return f"Login(ca={self.ca}, api_key={'...' if self.api_key else ''!r})"


def read_login(tls_ca: Path | None, api_key_file: Path | None) -> Login:
    """What the options and the environment say. Raises typer.Exit, after a line on what to do, for a file that cannot
    be read."""
    api_key = os.environ.get(KEY_VARIABLE, "")
    if api_key_file is not None:
        try:
            api_key = api_key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            fail(f"cannot read the API key file {api_key_file}")
    api_key = api_key.strip()
    if len(api_key) > _MAX_KEY_CHARS or not api_key.isascii() or (api_key and not api_key.isprintable()):
        # Never shown, whatever it is.
        fail(f"{api_key_file or KEY_VARIABLE} holds no API key: one line that begins with sm-")
    return Login(ca=tls_ca, api_key=api_key)
