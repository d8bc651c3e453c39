"""The certificate that a process shows and the CA that it trusts: read from files, checked, and read anew when they
change.

Owns what a certificate must be to take part. Owns no connection (``server``, ``channels``) and makes no certificate
(``starmesh certs``).

All connections between services are mutual TLS, and both ends demand two things of the other's certificate: that the
mesh's CA signed it, and that it is for the mesh's name (``MESH_NAME``), whatever host it comes from. Instances come and
go under names that nobody knows beforehand, so a certificate per host would buy little: what counts is who belongs to
the mesh. With the name a CA that signs for others too does no harm: theirs lack it.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from starmesh.clock import Clock, WallClock

log = logging.getLogger(__name__)

MESH_NAME: Final = "starmesh.internal"
"""The DNS name that certificates of services are for, unless the operator names another."""
LOOK_INTERVAL_S: Final = 1.0
"""Seconds between two looks at the files, at least."""
MAX_PEM_BYTES: Final = 1 << 20


class TlsError(Exception):
    """Certificate files that cannot be used. The message says which and why, and holds nothing of a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files: this process's certificate with the intermediate ones after it, its key, the CAs that it trusts."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class _Pem:
    """What the files held at one time, and when that ends: see ``Credentials.expires_s``."""

    cert: bytes
    key: bytes
    ca: bytes
    expires_s: float


class Credentials:
    """This process's certificate and CA, as the files have them now. May be used by several threads."""

    def __init__(self, files: TlsFiles, *, server_name: str = MESH_NAME, clock: Clock | None = None) -> None:
        """Read the files. ``server_name`` is what every certificate of the mesh is for. Raises TlsError."""
        self.server_name = server_name
        self._files = files
        self._clock = clock or WallClock()
        self._lock = threading.Lock()
        self._seen = _look(files)
        self._looked_s = self._clock.now_s()
        self._pem = self._read()
        self._channel = _channel_credentials(self._pem)
        self._generation = 0

    @classmethod
    def load(cls, cert: Path, key: Path, ca: Path, *, server_name: str = MESH_NAME) -> Self:
        """As the constructor."""
        return cls(TlsFiles(cert=cert, key=key, ca=ca), server_name=server_name)

    def __repr__(self) -> str:
        return f"<Credentials {self._files.cert}, generation {self.generation}>"

    @property
    def generation(self) -> int:
        """Goes up whenever the files have changed and can be used: what was made before is then out of date."""
        with self._lock:
            self._refresh()
            return self._generation

    @property
    def expires_s(self) -> float:
        """When others stop accepting the certificate in use, in seconds since 1970: when it ends itself, or an
        intermediate one, or the CA that has signed them. Goes on being told once it is over."""
        with self._lock:
            self._refresh()
            return self._pem.expires_s

    def for_channel(self) -> grpc.ChannelCredentials:
        """For a new channel to another service."""
        with self._lock:
            self._refresh()
            return self._channel

    def for_server(self, *, require_client_certificate: bool) -> grpc.ServerCredentials:
        """For a server; each handshake looks whether the files have changed. Without ``require_client_certificate``
        it is plain TLS."""
        with self._lock:
            made_for = self._generation
            first = _server_configuration(self._pem, with_ca=require_client_certificate)

        def renew() -> grpc.ServerCertificateConfiguration | None:
            nonlocal made_for
            with self._lock:
                self._refresh()
                if made_for == self._generation:
                    return None
                made_for = self._generation
                return _server_configuration(self._pem, with_ca=require_client_certificate)

        # None for what stays as it is: the stub does not know of it.
        return grpc.dynamic_ssl_server_credentials(first, renew, require_client_certificate)  # type: ignore[arg-type]

    def for_https(self) -> ssl.SSLContext:
        """For a server of HTTPS: plain TLS 1.2 or newer, without client certificates. Follows the files too."""
        current = self._https_context()
        made_for = self._generation

        def renew(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
            # Called with each handshake, also for clients that name no server.
            nonlocal current, made_for
            if (generation := self.generation) != made_for:
                # Fails when they have changed again meanwhile, by halves: then the last one goes on too.
                with contextlib.suppress(OSError):
                    current, made_for = self._https_context(), generation
            connection.context = current

        listening = self._https_context()
        listening.sni_callback = renew
        return listening

    def _https_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._files.cert, self._files.key)
        return context

    def _refresh(self) -> None:
        """Read files that have changed; broken ones change nothing, and are told of in one line of the log."""
        now_s = self._clock.now_s()
        if now_s - self._looked_s < LOOK_INTERVAL_S:
            return
        self._looked_s = now_s
        seen = _look(self._files)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._pem = self._read()
        except TlsError as error:
            # Half of a change, when the certificate is here and its key is not yet: the other half is found next.
            log.error("the certificate stays as it was: %s", error)
            return
        self._channel = _channel_credentials(self._pem)
        self._generation += 1

    def _read(self) -> _Pem:
        """Raises TlsError for files that nobody would accept a connection with."""
        cert, key_pem, ca = (_content(path) for path in (self._files.cert, self._files.key, self._files.ca))
        chain = _certificates(cert, self._files.cert)
        certificate = chain[0]
        authorities = _certificates(ca, self._files.ca)
        try:
            key = load_pem_private_key(key_pem, password=None)
            belongs = _public_bytes(key.public_key()) == _public_bytes(certificate.public_key())
        except (ValueError, TypeError):
            raise TlsError(f"{self._files.key}: holds no private key without a passphrase, in PEM") from None
        except UnsupportedAlgorithm as error:
            raise TlsError(f"{self._files.key} or {self._files.cert}: {error}; use ECDSA over P-256, or RSA") from None
        if not belongs:
            raise TlsError(f"{self._files.key} is not the key of {self._files.cert}")
        ends = certificate.not_valid_after_utc
        if ends <= datetime.now(UTC):
            raise TlsError(f"{self._files.cert} has expired on {ends:%Y-%m-%d %H:%M} UTC; issue a new one")
        if self.server_name not in _names(certificate):
            raise TlsError(
                f"{self._files.cert} is not for {self.server_name}, so no other service would accept it; issue one "
                "with that name, or say with --tls-server-name which name all certificates of the mesh are for"
            )
        log.info("certificate %s, valid until %s UTC", self._files.cert, f"{ends:%Y-%m-%d %H:%M}")
        return _Pem(cert, key_pem, ca, _end_of(chain, authorities).timestamp())


def client_credentials(ca: Path) -> grpc.ChannelCredentials:
    """For a client of the router: trusts the CAs of the file and shows no certificate. Raises TlsError."""
    content = _content(ca)
    _certificates(content, ca)
    return grpc.ssl_channel_credentials(content)


def _channel_credentials(pem: _Pem) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(pem.ca, private_key=pem.key, certificate_chain=pem.cert)


def _server_configuration(pem: _Pem, *, with_ca: bool) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca if with_ca else None)


def _certificates(content: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise TlsError(f"{path}: holds no certificate in PEM") from None


def _end_of(chain: list[x509.Certificate], authorities: list[x509.Certificate]) -> datetime:
    """When the first of a chain ends, or the last of the authorities that have signed it: a CA that was renewed is
    there twice for a while, and others beside it are of no matter."""
    ends = [certificate.not_valid_after_utc for certificate in chain]
    signers = [authority.not_valid_after_utc for authority in authorities if _signed(chain[-1], authority)]
    return min([*ends, max(signers)] if signers else ends)


def _signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _names(certificate: x509.Certificate) -> list[str]:
    """The DNS names that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.DNSName)


def _public_bytes(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined,no-any-return]


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PEM_BYTES + 1)
    except OSError as error:
        raise TlsError(f"{path}: {error.strerror}") from None
    if len(content) > MAX_PEM_BYTES:
        raise TlsError(f"{path}: is larger than {MAX_PEM_BYTES} bytes; is it PEM?")
    return content


def _look(files: TlsFiles) -> tuple[tuple[int, ...], ...]:
    """What changes when a file does, also by turning a symbolic link, as Kubernetes does with a secret."""
    seen: list[tuple[int, ...]] = []
    for path in (files.cert, files.key, files.ca):
        try:
            found = path.stat()
        except OSError:
            seen.append(())
        else:
            seen.append((found.st_mtime_ns, found.st_size, found.st_ino))
    return tuple(seen)
