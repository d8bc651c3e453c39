"""deploy/make-secrets, run as it is: what it makes is accepted by what reads it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from starmesh.rpc.api_keys import ApiKeys
from starmesh.rpc.credentials import Credentials, TlsError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def _make(directory: Path) -> None:
    command = ["sh", str(ROOT / "deploy" / "make-secrets"), str(directory), "localhost", "router"]
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


def test_the_ledgers_user_may_do_what_is_documented_and_tested(made: Path) -> None:
    """tests/ledger/test_secured.py runs the ledger's whole suite as the user that the document has."""
    documented = re.search(r"^user starmesh (.*)$", (ROOT / "docs" / "security.md").read_text(), re.MULTILINE)
    rules = dict(line.split(" ", 2)[1:] for line in (made / "valkey" / "users.acl").read_text().splitlines())
    assert documented is not None
    commands = [{word for word in text.split() if word[0] in "+-"} for text in (documented[1], rules["starmesh"])]
    assert commands[0] == commands[1]
    assert "~{starmesh:*" in rules["starmesh"].split()
    assert rules["default"].endswith("-@all +ping")
    password = (made / "mesh" / "ledger-password").read_bytes()
    assert f"#{hashlib.sha256(password).hexdigest()}" in rules["starmesh"].split()
