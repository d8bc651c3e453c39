"""``starmesh keys``: the file of API keys that a router is given with ``--api-keys``.

Editing is for one person at a time; routers that follow the file see each state of it or the next, never half of one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from starmesh.cli.run import fail

keys_app = typer.Typer(help="Make and revoke API keys of a router.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="The router's --api-keys.")]


class ScopeName(StrEnum):
    """The scopes, without loading what checks them."""

    generate = "generate"
    operate = "operate"


@keys_app.command()
def create(
    *,
    file: File,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Name of the key: in logs and limits.")],
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(help="generate: ask the model; operate: see and steer the cluster. May be repeated."),
    ] = None,
    requests_per_s: Annotated[float | None, typer.Option(help="Requests that it may start per second.")] = None,
    max_requests: Annotated[int | None, typer.Option(help="Requests that it may have running.")] = None,
    days: Annotated[int | None, typer.Option(min=1, max=36_500, help="Days until it expires.")] = None,
) -> None:
    """Make a key and print it, this once: the file keeps its hash only. (Default scope: generate.)"""
    from starmesh.rpc.key_file import ApiKey, KeyFileError, Scope, digest_of, new_secret, read_keys, write_keys

    secret = new_secret()
    try:
        # An empty file is no file of keys yet, as a volume or a template may have put it there.
        keys = read_keys(file) if file.exists() and file.stat().st_size else ()
        if any(key.key_id == key_id for key in keys):
            fail(f"{file} has a key {key_id} already; revoke it first, or name another")
        key = ApiKey(
            key_id=key_id,
            sha256=digest_of(secret),
            scopes=frozenset(Scope(name.value) for name in scope or [ScopeName.generate]),
            requests_per_s=requests_per_s,
            max_requests=max_requests,
            expires=None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days),
        )
        write_keys(file, (*keys, key))
    except (KeyFileError, ValueError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {file}: {error.strerror}")
    print(secret)


@keys_app.command("list")
def list_keys(*, file: File) -> None:
    """Show the keys: names, scopes, limits, expiry."""
    from rich.console import Console
    from rich.table import Table

    from starmesh.rpc.key_file import KeyFileError, read_keys

    try:
        keys = read_keys(file)
    except KeyFileError as error:
        fail(str(error))
    now = datetime.now(UTC)
    table = Table("key", "scopes", "requests/s", "running", "expires", box=None)
    for key in keys:
        expires = "" if key.expires is None else f"{key.expires.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
        table.add_row(
            key.key_id,
            ", ".join(sorted(key.scopes)),
            "" if key.requests_per_s is None else f"{key.requests_per_s:g}",
            "" if key.max_requests is None else str(key.max_requests),
            f"{expires} (over)" if key.expires is not None and key.expires <= now else expires,
        )
    Console().print(table)


@keys_app.command()
def revoke(*, file: File, key_id: Annotated[str, typer.Argument(metavar="ID", help="Name of the key.")]) -> None:
    """Remove a key: routers refuse it within seconds. What runs under it goes on to its end."""
    from starmesh.rpc.key_file import KeyFileError, read_keys, write_keys

    try:
        keys = read_keys(file)
        left = tuple(key for key in keys if key.key_id != key_id)
        if len(left) == len(keys):
            fail(f"{file} has no key {key_id}; `starmesh keys list {file}` shows those that it has")
        write_keys(file, left)
    except KeyFileError as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {file}: {error.strerror}")
