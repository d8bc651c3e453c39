"""What ``starmesh up --tls`` runs on: a CA that exists only while certificates are made, one certificate for the
services of this machine, and one API key. The files go with the run directory; they are for loopback and for trying
things, not for a cluster of several machines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from starmesh.cli.certs import Authority
from starmesh.cli.login import Login
from starmesh.rpc.credentials import MESH_NAME, Credentials, TlsFiles
from starmesh.rpc.key_file import ApiKey, Scope, digest_of, new_secret, write_keys

_LIFETIME: Final = timedelta(days=365)
_NAMES: Final = (MESH_NAME, "localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSecurity:
    """The files of one local cluster."""

    tls: TlsFiles
    api_keys: Path
    """The router's."""
    api_key_file: Path
    """The client's, with the key itself."""
    credentials: Credentials

    @classmethod
    def make(cls, directory: Path) -> LocalSecurity:
        """Write them. Raises CliError when files are there already."""
        tls = Authority.make("starmesh up", lifetime=_LIFETIME).issue(
            "service", directory, lifetime=_LIFETIME, names=_NAMES
        )
        secret = new_secret()
        api_keys, api_key_file = directory / "api-keys", directory / "api-key"
        write_keys(api_keys, (ApiKey(key_id="local", sha256=digest_of(secret), scopes=frozenset(Scope)),))
        with os.fdopen(os.open(api_key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{secret}\n")
        return cls(tls=tls, api_keys=api_keys, api_key_file=api_key_file, credentials=Credentials(tls))

    @property
    def login(self) -> Login:
        """What clients reach the router with."""
        return Login(ca=self.tls.ca, api_key=self.api_key_file.read_text().strip())

    @property
    def shared_flags(self) -> tuple[str, ...]:
        """Flags of every service."""
        return ("--tls-cert", str(self.tls.cert), "--tls-key", str(self.tls.key), "--tls-ca", str(self.tls.ca))

    @property
    def router_flags(self) -> tuple[str, ...]:
        """Flags of the router."""
        return ("--api-keys", str(self.api_keys))

    @property
    def client_options(self) -> str:
        """What a command line needs."""
        return f"--tls-ca {self.tls.ca} --api-key-file {self.api_key_file}"
