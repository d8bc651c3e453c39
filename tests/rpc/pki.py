"""Certificates for tests: good ones, and those that nobody must accept."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import grpc

from starmesh.cli.certs import Authority
from starmesh.clock import VirtualClock
from starmesh.rpc.credentials import LOOK_INTERVAL_S, MESH_NAME, Credentials, TlsFiles

DAY = timedelta(days=1)


class Pki:
    """A CA and the certificates that it issues, in one directory. Time passes for ``credentials`` only by ``look``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = Authority.make("test CA", lifetime=DAY)
        self.authority.write(directory)
        self.clock = VirtualClock()
        self._touched_s = 1_000_000_000

    @property
    def ca(self) -> Path:
        return self.directory / "ca.crt"

    def issue(
        self, name: str = "service", *, names: tuple[str, ...] = (MESH_NAME,), lifetime: timedelta = DAY
    ) -> TlsFiles:
        """Write NAME.crt and NAME.key, over those that are there."""
        files = self.authority.issue(name, self.directory, lifetime=lifetime, names=names, overwrite=True)
        self.touch(files.cert, files.key)
        return files

    def expired(self, name: str = "expired") -> TlsFiles:
        return self.issue(name, lifetime=-timedelta(minutes=1))

    def credentials(self, name: str = "service") -> Credentials:
        return Credentials(self.issue(name), clock=self.clock)

    def touch(self, *paths: Path) -> None:
        """Give files a time of change that differs however fast the test is."""
        self._touched_s += 10
        for path in paths:
            os.utime(path, (self._touched_s, self._touched_s))

    def look(self) -> None:
        """Let so much time pass that files are looked at again."""
        self.clock.advance(LOOK_INTERVAL_S)


def channel_credentials(files: TlsFiles | None, ca: Path) -> grpc.ChannelCredentials:
    """Of any certificate, also of one that ``Credentials`` would not take; of none without ``files``."""
    if files is None:
        return grpc.ssl_channel_credentials(ca.read_bytes())
    return grpc.ssl_channel_credentials(ca.read_bytes(), files.key.read_bytes(), files.cert.read_bytes())


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Of any certificate, also of one that ``Credentials`` would not take."""
    pair = (files.key.read_bytes(), files.cert.read_bytes())
    return grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
