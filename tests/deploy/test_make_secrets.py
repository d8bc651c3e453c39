"""deploy/make-secrets, run as it is: what it makes is accepted by what reads it, and its ledger user can do all that a
ledger does, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

import pytest
from redis import exceptions
from redis.asyncio import Redis

from starmesh.ledger.redis import RedisLedger
from starmesh.ledger.server import EmbeddedServer
from starmesh.rpc.api_keys import ApiKeys
from starmesh.rpc.credentials import Credentials, TlsError
from tests.ledger.conformance import Lapse, LedgerConformance
from tests.ledger.conftest import TIMEOUT_S, cluster, server, until

__all__ = ["cluster", "server"]

SCRIPT = Path(__file__).parents[2] / "deploy" / "make-secrets"
ENVIRONMENT = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def _make(directory: Path) -> None:
    command = ["sh", str(SCRIPT), str(directory), "localhost", "router"]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("secrets")
    _make(directory)
    return directory


def test_services_take_their_certificate_and_not_valkeys(made: Path) -> None:
    Credentials.load(*(made / "mesh" / name for name in ("tls.crt", "tls.key", "ca.crt")))
    # With it whoever breaks into Valkey would be a service.
    with pytest.raises(TlsError, match=r"is not for starmesh\.internal"):
        Credentials.load(*(made / "valkey" / name for name in ("tls.crt", "tls.key", "ca.crt")))


def test_nobody_else_reads_any_of_it(made: Path) -> None:
    assert not [path for path in made.rglob("*") if path.is_dir() and path.stat().st_mode & 0o077]


def test_there_is_no_key_until_somebody_makes_one(made: Path) -> None:
    assert not len(ApiKeys.load(made / "keys" / "api-keys.jsonl"))


def test_a_second_run_changes_nothing(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    _make(made)
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


@pytest.fixture
async def as_user(server: EmbeddedServer, made: Path) -> str:
    """The url of the server for the user of users.acl, whom it knows from then on."""
    rules = {line.split()[1]: line.split()[2:] for line in (made / "valkey/users.acl").read_text().splitlines()}
    async with Redis.from_url(server.url) as administrator:
        # What is read of the file is what it would load: it knows them by the same words.
        await administrator.execute_command("ACL", "SETUSER", "starmesh", "reset", *rules["starmesh"])
    return server.url.replace("unix://", "unix://starmesh@", 1)


@pytest.fixture
async def ledger(as_user: str, made: Path, cluster: str) -> AsyncIterator[RedisLedger]:
    opened = RedisLedger.connect(
        as_user, cluster=cluster, password_file=made / "mesh" / "ledger-password", timeout_s=TIMEOUT_S
    )
    yield opened
    await opened.close()


@pytest.fixture
def lapse() -> Lapse:
    return until


class TestTheLedgersUser(LedgerConformance):
    __test__: ClassVar[bool] = True


@pytest.mark.parametrize("command", ["KEYS *", "FLUSHALL", "CONFIG GET *", "GET others", "ACL LIST"])
async def test_it_may_do_nothing_else(as_user: str, made: Path, command: str) -> None:
    password = (made / "mesh" / "ledger-password").read_text()
    async with Redis.from_url(as_user, password=password) as client:
        with pytest.raises(exceptions.NoPermissionError):
            await client.execute_command(*command.split())
