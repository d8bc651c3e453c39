"""``starmesh certs`` and ``starmesh keys``, as a person uses them."""

from __future__ import annotations

import json
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from typer.testing import CliRunner

from starmesh.cli.app import app
from starmesh.cli.certs_commands import certs_app
from starmesh.cli.keys_commands import keys_app
from starmesh.cli.login import read_login
from starmesh.rpc.credentials import Credentials, TlsFiles
from starmesh.rpc.key_file import Scope, digest_of, read_keys

pytestmark = pytest.mark.fast


def starmesh(group: str, *arguments: str | Path, fails: bool = False) -> str:
    """What the command prints, on either stream."""
    # The group alone where that will do: Typer makes the whole tree of commands anew each time.
    groups = {"certs": certs_app, "keys": keys_app}
    words = [str(argument) for argument in arguments]
    ran = CliRunner().invoke(groups.get(group, app), words if group in groups else [group, *words])
    assert (ran.exit_code != 0) == fails, ran.output
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    return ran.output.strip()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_ca_and_a_certificate(tmp_path: Path) -> None:
    ca, out = tmp_path / "ca", tmp_path / "certs"
    starmesh("certs", "init", "--out", ca)
    assert mode(ca / "ca.key") == 0o600
    printed = starmesh(
        *("certs", "issue", "router", "--ca", ca, "--out", out, "--days", "30"),
        *("--san", "router.example.com", "--san", "10.0.0.5"),
    )
    files = TlsFiles(cert=out / "router.crt", key=out / "router.key", ca=out / "ca.crt")
    assert printed.split() == ["--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca)]
    assert mode(files.key) == 0o600
    assert not (out / "ca.key").exists()
    Credentials(files)  # takes it
    certificate = x509.load_pem_x509_certificate(files.cert.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["starmesh.internal", "router.example.com"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.5"]
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=29) < left <= timedelta(days=30)


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    starmesh("certs", "init", "--out", tmp_path)
    starmesh("certs", "issue", "service", "--out", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for command in (("init",), ("issue", "service")):
        assert "--overwrite" in starmesh("certs", *command, "--out", tmp_path, fails=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    starmesh("certs", "issue", "service", "--out", tmp_path, "--overwrite")
    assert (tmp_path / "service.crt").read_bytes() != before["service.crt"]
    assert (tmp_path / "ca.crt").read_bytes() == before["ca.crt"]
    Credentials.load(tmp_path / "service.crt", tmp_path / "service.key", tmp_path / "ca.crt")


def test_what_cannot_be_issued_is_told(tmp_path: Path) -> None:
    assert "starmesh certs init" in starmesh("certs", "issue", "service", "--out", tmp_path, fails=True)
    starmesh("certs", "init", "--out", tmp_path)
    starmesh("certs", "issue", "../service", "--out", tmp_path, fails=True)
    assert "CA's own" in starmesh("certs", "issue", "ca", "--out", tmp_path, "--overwrite", fails=True)
    assert "DNS name" in starmesh("certs", "issue", "service", "--out", tmp_path, "--san", "é", fails=True)
    (tmp_path / "ca.key").write_text("nonsense")
    assert "ca.key" in starmesh("certs", "issue", "service", "--out", tmp_path, fails=True)
    (tmp_path / "file").write_text("")
    assert "cannot write" in starmesh("certs", "init", "--out", tmp_path / "file" / "below", fails=True)


def test_the_files_of_two_cas_are_not_mixed(tmp_path: Path) -> None:
    """What has no error here has one at the first handshake, which says less."""
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "certs"
    starmesh("certs", "init", "--out", first)
    starmesh("certs", "init", "--out", second)
    starmesh("certs", "issue", "service", "--ca", first, "--out", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said = starmesh("certs", "issue", "service", "--ca", second, "--out", out, "--overwrite", fails=True)
    assert "holds another CA" in said
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    # The first step of replacing a CA: both are trusted.
    (out / "ca.crt").write_bytes(before["ca.crt"] + (second / "ca.crt").read_bytes())
    starmesh("certs", "issue", "service", "--ca", second, "--out", out, "--overwrite")
    (out / "ca.crt").write_text("nonsense")
    assert "no certificate" in starmesh("certs", "issue", "other", "--ca", second, "--out", out, fails=True)
    (second / "ca.key").write_bytes((first / "ca.key").read_bytes())
    assert "not the key" in starmesh("certs", "issue", "service", "--ca", second, "--out", tmp_path, fails=True)


def test_a_ca_key_with_a_passphrase_is_told_of(tmp_path: Path) -> None:
    starmesh("certs", "init", "--out", tmp_path)
    key = load_pem_private_key((tmp_path / "ca.key").read_bytes(), password=None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "ca.key").write_bytes(locked)
    assert "ca.key" in starmesh("certs", "issue", "service", "--out", tmp_path, fails=True)


def test_openssl_agrees(tmp_path: Path) -> None:
    """That both ends may use it, and that the CA may sign nothing but certificates of services."""
    starmesh("certs", "init", "--out", tmp_path)
    starmesh("certs", "issue", "service", "--out", tmp_path)
    for purpose in ("sslserver", "sslclient"):
        command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", "-purpose", purpose, "service.crt"]
        try:
            ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("openssl is not installed")
        assert ran.returncode == 0, ran.stderr


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    alice = starmesh("keys", "create", file, "alice", "--requests-per-s", "2.5", "--max-requests", "4", "--days", "7")
    bob = starmesh("keys", "create", file, "bob", "--scope", "operate", "--scope", "generate")
    assert alice.startswith("sm-") and bob.startswith("sm-") and alice != bob
    keys = {key.key_id: key for key in read_keys(file)}
    assert keys["alice"].sha256 == digest_of(alice)
    assert keys["alice"].scopes == {Scope.GENERATE}
    assert (keys["alice"].requests_per_s, keys["alice"].max_requests) == (2.5, 4)
    assert keys["alice"].expires is not None
    assert timedelta(days=6) < keys["alice"].expires - datetime.now(UTC) <= timedelta(days=7)
    assert keys["bob"].scopes == set(Scope)
    assert keys["bob"].requests_per_s is keys["bob"].max_requests is keys["bob"].expires is None
    for secret in (alice, bob):
        assert secret not in file.read_text()
    listed = starmesh("keys", "list", file)
    assert all(word in listed for word in ("alice", "bob", "2.5", "4", "generate, operate"))
    starmesh("keys", "revoke", file, "alice")
    assert [key.key_id for key in read_keys(file)] == ["bob"]


def test_an_empty_file_takes_a_first_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch()
    starmesh("keys", "create", file, "alice")
    assert [key.key_id for key in read_keys(file)] == ["alice"]


def test_what_is_wrong_with_a_key_is_told(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    assert "starmesh keys create" in starmesh("keys", "list", file, fails=True)
    starmesh("keys", "create", file, "alice")
    before = file.read_bytes()
    assert "already" in starmesh("keys", "create", file, "alice", fails=True)
    assert "key_id" in starmesh("keys", "create", file, "two words", fails=True)
    assert "requests_per_s" in starmesh("keys", "create", file, "bob", "--requests-per-s", "0", fails=True)
    assert "max_requests" in starmesh("keys", "create", file, "bob", "--max-requests", "-1", fails=True)
    assert "keys list" in starmesh("keys", "revoke", file, "bob", fails=True)
    assert "cannot write" in starmesh("keys", "create", tmp_path / "missing" / "keys", "bob", fails=True)
    assert file.read_bytes() == before
    file.write_text(json.dumps({"key_id": "alice"}))
    assert "line 1" in starmesh("keys", "create", file, "bob", fails=True)


def test_a_login_is_read_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("sm-from-file\n")
    monkeypatch.setenv("STARMESH_API_KEY", "sm-from-environment")
    assert read_login(None, None).api_key == "sm-from-environment"
    login = read_login(tmp_path, file)
    assert (login.ca, login.api_key) == (tmp_path, "sm-from-file")
    assert "sm-from-file" not in repr(login)
    for content in (b"\xff", b"two\nlines", b"sm-" + b"x" * 300):
        file.write_bytes(content)
        ran = CliRunner().invoke(app, ["status", "--api-key-file", str(file)])
        assert ran.exit_code == 1
        assert "two" not in ran.output and "xxx" not in ran.output
    file.unlink()
    assert str(file) in starmesh("status", "--api-key-file", file, fails=True)


def test_a_key_does_not_go_over_a_network_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STARMESH_API_KEY", "sm-secret")
    said = starmesh("status", "--address", "router.example.com:50051", fails=True)
    assert "--tls-ca" in said and "sm-secret" not in said
