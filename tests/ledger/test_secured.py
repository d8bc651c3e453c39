"""The Redis ledger as docs/security.md has it: a user who may do no more than is needed, a password in a file, TLS."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from starmesh.ledger import LedgerError, LedgerUnavailable
from starmesh.ledger.redis import RedisLedger, is_encrypted
from starmesh.ledger.server import EmbeddedServer
from starmesh.rpc.credentials import MESH_NAME, Credentials
from tests.rpc.pki import Pki

from .conformance import Lapse, LedgerConformance
from .conftest import TIMEOUT_S, until

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"


def documented_user(cluster: str, password: str) -> list[str]:
    """The rules of the user that the document tells operators to make."""
    lines = re.findall(r"^user starmesh (.*)$", DOCUMENT.read_text(), re.MULTILINE)
    assert len(lines) == 1
    return str(lines[0]).replace("default", cluster).replace("PASSWORD", password).split()


@pytest.fixture
def password() -> str:
    return secrets.token_hex(16)


@pytest.fixture
def password_file(tmp_path: Path, password: str) -> Path:
    path = tmp_path / "password"
    path.write_text(f"{password}\n")
    return path


@pytest.fixture
async def user(server: EmbeddedServer, cluster: str, password: str) -> AsyncIterator[str]:
    """The name of a user of the server that may use ``cluster``."""
    admin = Redis.from_url(server.url)
    name = f"user-{secrets.token_hex(4)}"
    await admin.execute_command("ACL", "SETUSER", name, *documented_user(cluster, password))
    yield name
    await admin.execute_command("ACL", "DELUSER", name)
    await admin.aclose()


@pytest.fixture
async def ledger(server: EmbeddedServer, user: str, cluster: str, password_file: Path) -> AsyncIterator[RedisLedger]:
    url = server.url.replace("unix://", f"unix://{user}@")
    made = RedisLedger.connect(url, cluster=cluster, password_file=password_file, timeout_s=TIMEOUT_S)
    yield made
    await made.close()


@pytest.fixture
def lapse() -> Lapse:
    return until


class TestLedgerOfARestrictedUser(LedgerConformance):
    """All that the ledger does is within what the user may."""

    __test__: ClassVar[bool] = True


async def test_the_user_may_nothing_else(server: EmbeddedServer, user: str, password: str, cluster: str) -> None:
    client = Redis.from_url(server.url.replace("unix://", f"unix://{user}@"), password=password)
    try:
        for command in (
            ["KEYS", "*"],
            ["FLUSHALL"],
            ["CONFIG", "GET", "*"],
            ["EVAL", "return 1", "0"],
            ["ACL", "LIST"],
        ):
            with pytest.raises(Exception, match=r"(?i)no permissions"):
                await client.execute_command(*command)
        with pytest.raises(Exception, match=r"(?i)no permissions"):
            await client.set("{starmesh:another}:instances", "x")
    finally:
        await client.aclose()


async def test_a_wrong_password_is_told_without_it(
    server: EmbeddedServer, user: str, cluster: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong"
    path.write_text("wrong-password")
    ledger = RedisLedger.connect(
        server.url.replace("unix://", f"unix://{user}@"), cluster=cluster, password_file=path, timeout_s=TIMEOUT_S
    )
    try:
        with pytest.raises(LedgerUnavailable, match=r"user or password|username-password") as caught:
            await ledger.view()
        assert "wrong-password" not in str(caught.value)
    finally:
        await ledger.close()


async def test_a_password_that_is_replaced_needs_no_restart(
    server: EmbeddedServer, user: str, ledger: RedisLedger, password_file: Path
) -> None:
    async with Redis.from_url(server.url) as admin:

        async def cut() -> None:
            """As an operator who trusts no connection that was made with the old password."""
            await admin.execute_command("CLIENT", "KILL", "USER", user)

        async def fails_for(reason: str) -> None:
            async def failed() -> bool:
                with pytest.raises(LedgerUnavailable) as caught:
                    await ledger.view()
                return reason in str(caught.value)

            # The first one may have met a connection that was just cut.
            await until(failed)

        await ledger.view()
        await admin.execute_command("ACL", "SETUSER", user, "resetpass", ">another")
        await ledger.view()
        await cut()
        await fails_for("username-password")
        password_file.write_text("another\n")
        await ledger.view()
        # A file that is there by halves: told, and taken once it is whole.
        password_file.write_text("")
        await cut()
        await fails_for(f"{password_file} is empty")
        password_file.write_text("another")
        await ledger.view()


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff"])
def test_a_password_file_that_holds_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LedgerError, match=str(path)):
        RedisLedger.connect("redis://127.0.0.1", password_file=path)


def test_a_ca_is_for_tls(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="not rediss://"):
        RedisLedger.connect("redis://127.0.0.1", ca=tmp_path)
    with pytest.raises(LedgerError, match="is not there"):
        RedisLedger.connect("rediss://127.0.0.1", ca=tmp_path / "missing")


@pytest.mark.parametrize(
    ("url", "encrypted"),
    [
        ("unix:///run/redis.sock", True),
        ("rediss://redis.example.com", True),
        ("redis://127.0.0.1:6379", True),
        ("redis://:password@[::1]:6379/0", True),
        ("redis://localhost", True),
        ("redis://redis.example.com", False),
        ("redis://user:password@10.0.0.5:6379", False),
        ("redis://127.0.0.1.example.com", False),
        ("redis://0.0.0.0", False),
    ],
)
def test_which_urls_need_leave_to_be_used(url: str, encrypted: bool) -> None:
    assert is_encrypted(url) is encrypted


# --- TLS: the embedded server has none, so what ends it is a proxy before it -----------------------------------------


@asynccontextmanager
async def tls_before(url: str, credentials: Credentials) -> AsyncIterator[int]:
    """The port of a TLS server that passes everything on to the plaintext server of ``url``."""
    there = urlsplit(url)

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(there.hostname, there.port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=credentials.for_https())
    async with proxy:
        yield proxy.sockets[0].getsockname()[1]


async def test_the_ledger_speaks_tls_and_checks_whom_it_speaks_to(tmp_path: Path) -> None:
    pki = Pki(tmp_path)
    (tmp_path / "other").mkdir()
    other = Pki(tmp_path / "other")
    good = Credentials(pki.issue("redis", names=(MESH_NAME, "127.0.0.1")))
    elsewhere = Credentials(pki.issue("elsewhere", names=(MESH_NAME, "192.0.2.1")))
    async with await EmbeddedServer.start(tcp=True) as server:
        password = urlsplit(server.url).password
        path = tmp_path / "password"
        path.write_text(str(password))

        async def view(credentials: Credentials, ca: Path) -> None:
            async with tls_before(server.url, credentials) as port:
                ledger = RedisLedger.connect(
                    f"rediss://127.0.0.1:{port}/0", password_file=path, ca=ca, timeout_s=TIMEOUT_S
                )
                try:
                    await ledger.view()
                finally:
                    await ledger.close()

        await view(good, pki.ca)
        for credentials, ca in ((good, other.ca), (elsewhere, pki.ca)):
            with pytest.raises(LedgerUnavailable, match=r"(?i)certificate"):
                await view(credentials, ca)
