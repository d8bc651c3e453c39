"""What the settings of a service say of encryption: all of TLS or none, plaintext only where it was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.router.config import RouterSettings
from starmesh.instance.settings import EngineSettings
from starmesh.process import ServiceSettings
from starmesh.rpc.credentials import TlsError
from starmesh.types import TransferBackend
from tests.rpc.pki import Pki

pytestmark = pytest.mark.fast

TLS = ("tls_cert", "tls_key", "tls_ca")


def settings(**values: Any) -> ServiceSettings:
    return ServiceSettings(_cli_parse_args=False, **values)


def engine(**values: Any) -> EngineSettings:
    return EngineSettings(_cli_parse_args=False, **values)


def test_all_of_tls_or_none(tmp_path: Path) -> None:
    files = Pki(tmp_path).issue()
    paths = {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}
    assert settings().load_credentials() is None
    loaded = settings(**paths).load_credentials()
    assert loaded is not None and loaded.server_name == "starmesh.internal"
    for left_out in TLS:
        with pytest.raises(ValidationError, match="give --tls-cert, --tls-key and --tls-ca, or none of them"):
            settings(**{name: path for name, path in paths.items() if name != left_out})
    with pytest.raises(TlsError, match="No such file"):
        settings(**paths | {"tls_key": tmp_path / "missing"}).load_credentials()


def test_empty_variables_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a compose file passes on what is not set."""
    for name in (*TLS, "ledger_ca", "ledger_password_file", "api_keys"):
        monkeypatch.setenv(f"STARMESH_{name.upper()}", "")
    made = RouterSettings(_cli_parse_args=False)
    assert made.load_credentials() is None
    assert made.api_keys is made.ledger_ca is made.ledger_password_file is None


def test_a_plaintext_ledger_beyond_loopback_is_asked_for_by_name() -> None:
    url = "redis://redis.example.com:6379"
    with pytest.raises(ValidationError, match="--allow-plaintext"):
        settings(ledger=url)
    assert settings(ledger=url, allow_plaintext=True).ledger == url
    assert settings(ledger="rediss://redis.example.com:6379").ledger


def test_with_tls_kv_goes_by_what_is_encrypted_unless_asked_for_by_name(tmp_path: Path) -> None:
    files = Pki(tmp_path).issue()
    tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}
    nixl, stream = TransferBackend.NIXL, TransferBackend.STREAM
    assert engine().transfer_backends == [nixl, stream]
    assert engine(**tls).transfer_backends == [stream]
    assert engine(**tls, transfer="nixl,stream").transfer_backends == [nixl, stream]
    assert engine(transfer="stream").transfer_backends == [stream]
    with pytest.raises(ValidationError, match="unknown"):
        engine(transfer="carrier-pigeon")
