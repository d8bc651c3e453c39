"""A certificate authority in a directory, for tests and for meshes without one of their own.

Owns making certificates and their files. What a certificate must be to take part is ``starmesh.rpc.credentials``'s.
ECDSA over P-256 throughout; keys are in PKCS #8 without a passphrase, readable by their owner only.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from starmesh.cli.run import CliError
from starmesh.rpc.credentials import MESH_NAME, TlsFiles

_BACKDATED: Final = timedelta(minutes=5)
"""Clocks differ: a certificate made now is to be valid on a machine that is behind."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA: its certificate and key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, name: str, *, lifetime: timedelta) -> Authority:
        """A new one."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(name)
        builder = (
            _builder(subject, subject, key, lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def open(cls, directory: Path) -> Authority:
        """The one in ``directory``. Raises CliError."""
        try:
            certificate = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
            key = load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
        except OSError as error:
            raise CliError(
                f"no CA in {directory} ({error.strerror}: {error.filename}); make one: starmesh certs init --out "
                f"{directory}"
            ) from None
        except (ValueError, TypeError):  # the latter for a key with a passphrase
            raise CliError(f"ca.crt and ca.key in {directory} are not what `starmesh certs init` makes") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CliError(f"ca.key in {directory} is not what `starmesh certs init` makes")
        if key.public_key() != certificate.public_key():
            raise CliError(f"ca.key in {directory} is not the key of ca.crt there; put those of one CA there")
        return cls(certificate, key)

    def write(self, directory: Path, *, overwrite: bool = False) -> Path:
        """Write ca.crt and ca.key; returns the former's path. Raises CliError when they are there, unless
        ``overwrite``."""
        certificate = directory / "ca.crt"
        _write({directory / "ca.key": _key_pem(self.key), certificate: _pem(self.certificate)}, overwrite=overwrite)
        return certificate

    def issue(
        self,
        name: str,
        directory: Path,
        *,
        lifetime: timedelta,
        names: tuple[str, ...] = (MESH_NAME,),
        overwrite: bool = False,
    ) -> TlsFiles:
        """Write NAME.crt and NAME.key, of a certificate for ``names`` (DNS names and IP addresses) that serves and
        calls, and ca.crt where it is not there. Raises CliError when they are there, unless ``overwrite``, and when
        ca.crt there is not this CA's: what is issued would not be known by it."""
        files = TlsFiles(cert=directory / f"{name}.crt", key=directory / f"{name}.key", ca=directory / "ca.crt")
        trusted = self._is_in(files.ca) if files.ca.exists() else None
        if trusted is False:
            raise CliError(f"{files.ca} holds another CA; add this one's certificate to it, or use another --out")
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_subject(name), self.certificate.subject, key, lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([_general_name(entry) for entry in names]), critical=False)
        )
        certificate = builder.sign(self.key, hashes.SHA256())
        _write({files.key: _key_pem(key), files.cert: _pem(certificate)}, overwrite=overwrite)
        if trusted is None:
            _write({files.ca: _pem(self.certificate)}, overwrite=False)
        return files

    def _is_in(self, bundle: Path) -> bool:
        """Whether this CA's certificate is among those of the file. Raises CliError for one that holds none."""
        try:
            return self.certificate in x509.load_pem_x509_certificates(bundle.read_bytes())
        except OSError as error:
            raise CliError(f"cannot read {bundle}: {error.strerror}") from None
        except ValueError:
            raise CliError(f"{bundle} holds no certificate in PEM; remove it") from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    # A lifetime that is over already is for tests.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + lifetime) - _BACKDATED)
        .not_valid_after(now + lifetime)
    )


def _subject(name: str) -> x509.Name:
    try:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    except ValueError:
        raise CliError("the name of a certificate has 1 to 64 characters") from None


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(entry: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(entry))
    except ValueError:
        pass
    try:
        return x509.DNSName(entry)
    except ValueError:
        raise CliError(f"{entry!r} is neither a DNS name in ASCII nor an IP address") from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(contents: dict[Path, bytes], *, overwrite: bool) -> None:
    """Write the files, each in one step: services that follow them see the old one or the new one."""
    there = [str(path) for path in contents if path.exists()]
    if there and not overwrite:
        raise CliError(f"{' and '.join(there)} would be overwritten; --overwrite does that")
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            mode = 0o600 if path.suffix == ".key" else 0o644
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
            temporary.replace(path)
    except OSError as error:
        raise CliError(f"cannot write {error.filename}: {error.strerror}") from None
