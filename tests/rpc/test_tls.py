"""Mutual TLS between real servers and channels: who is let in, who is believed, and certificates that change."""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from starmesh.cli.certs import Authority
from starmesh.rpc.channels import ChannelPool, open_channel
from starmesh.rpc.client_channel import open_client_channel
from starmesh.rpc.credentials import MESH_NAME, Credentials, TlsError, TlsFiles, client_credentials
from starmesh.rpc.probe import MESH_NAME as PROBED_NAME
from starmesh.rpc.probe import main as probe
from starmesh.rpc.server import RpcServer
from tests.rpc.pki import DAY, Pki, channel_credentials, server_credentials

TIMEOUT_S = 30.0
SERVING = health_pb2.HealthCheckResponse.SERVING
OVERRIDE = [("grpc.ssl_target_name_override", MESH_NAME), ("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Pki:
    (tmp_path / "other").mkdir()
    return Pki(tmp_path / "other")


@asynccontextmanager
async def serving(credentials: Credentials, *, members_only: bool = True) -> AsyncIterator[str]:
    server = RpcServer(listen="127.0.0.1:0", credentials=credentials, members_only=members_only)
    address = await server.start()
    await server.set_serving(True)
    try:
        yield address
    finally:
        await server.stop(0)


async def ask(channel: grpc.aio.Channel) -> Any:
    """The health of who answers. Raises AioRpcError."""
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    return answer.status


async def refusal(channel: grpc.aio.Channel) -> grpc.aio.AioRpcError:
    async with channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel)
    return caught.value


def secure(address: str, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(address, credentials, options=OVERRIDE)


async def serial_of(address: str, pki: Pki, files: TlsFiles | None = None, *, name: str = MESH_NAME) -> int:
    """Serial number of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=pki.ca)
    context.set_alpn_protocols(["h2"])
    if files is not None:
        context.load_cert_chain(files.cert, files.key)
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(TIMEOUT_S):
        _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=name)
    shown = writer.get_extra_info("peercert")
    writer.transport.abort()
    return int(shown["serialNumber"], 16)


async def test_services_of_a_mesh_speak_to_each_other(pki: Pki) -> None:
    """Whatever their hosts are called: the certificates are for the mesh's name only."""
    async with serving(pki.credentials("one")) as address, open_channel(address, pki.credentials("two")) as channel:
        assert await ask(channel) == SERVING


CALLERS: dict[str, Callable[[Pki, Pki], grpc.ChannelCredentials | None]] = {
    "plaintext": lambda pki, other: None,
    "no certificate": lambda pki, other: channel_credentials(None, pki.ca),
    "certificate of another CA": lambda pki, other: channel_credentials(other.issue(), pki.ca),
    "expired certificate": lambda pki, other: channel_credentials(pki.expired(), pki.ca),
}


@pytest.mark.parametrize("caller", CALLERS)
async def test_who_is_not_of_the_mesh_is_not_answered(pki: Pki, other: Pki, caller: str) -> None:
    credentials = CALLERS[caller](pki, other)
    async with serving(pki.credentials()) as address:
        channel = grpc.aio.insecure_channel(address) if credentials is None else secure(address, credentials)
        assert (await refusal(channel)).code() is grpc.StatusCode.UNAVAILABLE


async def test_a_certificate_for_something_else_is_no_membership(pki: Pki) -> None:
    """The CA may sign for others too."""
    files = pki.issue("other", names=("other.example", f"x.{MESH_NAME}"))
    async with serving(pki.credentials()) as address:
        error = await refusal(secure(address, channel_credentials(files, pki.ca)))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert MESH_NAME in (error.details() or "")


SERVERS: dict[str, Callable[[Pki, Pki], TlsFiles]] = {
    "certificate of another CA": lambda pki, other: other.issue(),
    "expired certificate": lambda pki, other: pki.expired(),
    "certificate for another name": lambda pki, other: pki.issue("other", names=("other.example",)),
}


@pytest.mark.parametrize("served", SERVERS)
async def test_who_serves_with_a_wrong_certificate_is_not_believed(pki: Pki, other: Pki, served: str) -> None:
    server = grpc.aio.server()
    port = server.add_secure_port("127.0.0.1:0", server_credentials(SERVERS[served](pki, other)))
    await server.start()
    try:
        error = await refusal(open_channel(f"127.0.0.1:{port}", pki.credentials()))
    finally:
        await server.stop(0)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    said = error.details() or ""
    assert "CERTIFICATE_VERIFY_FAILED" in said or "Hostname Verification" in said


async def test_clients_of_a_router_need_its_ca_and_no_certificate(pki: Pki, other: Pki) -> None:
    router = Credentials(pki.issue("router", names=(MESH_NAME, "127.0.0.1")), clock=pki.clock)
    async with serving(router, members_only=False) as address:
        async with open_client_channel(address, ca=pki.ca) as channel:
            assert await ask(channel) == SERVING
        wrong_ca = await refusal(open_client_channel(address, ca=other.ca))
        assert "CERTIFICATE_VERIFY_FAILED" in (wrong_ca.details() or "")
        assert (await refusal(open_client_channel(address))).code() is grpc.StatusCode.UNAVAILABLE
    inner = Credentials(pki.issue("inner"), clock=pki.clock)
    async with serving(inner, members_only=False) as address:
        # A certificate without the host that the client asked for.
        assert (await refusal(open_client_channel(address, ca=pki.ca))).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("address", ["192.0.2.1:50051", "router:50051", "[2001:db8::1]:50051"])
def test_an_api_key_never_crosses_a_network_in_the_clear(address: str) -> None:
    with pytest.raises(TlsError, match="unencrypted"):
        open_client_channel(address, api_key="sm-secret")


async def test_the_probe_speaks_tls(pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    assert PROBED_NAME == MESH_NAME
    files = pki.issue("probe")
    async with serving(pki.credentials()) as address:
        flags = ["--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca)]
        assert await asyncio.to_thread(probe, [address, *flags]) == 0
        assert await asyncio.to_thread(probe, [address, *flags[4:]]) == 1
        assert await asyncio.to_thread(probe, [address, "--tls-ca", str(pki.directory / "missing")]) == 1
    assert "No such file" in capsys.readouterr().out


# --- files that cannot be used ---------------------------------------------------------------------------------------


def with_passphrase(files: TlsFiles) -> None:
    key = load_pem_private_key(files.key.read_bytes(), password=None)
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))


def on_an_unknown_curve(files: TlsFiles) -> None:
    """The key with another number for its curve, as one has it that OpenSSL knows and our library does not."""
    key = load_pem_private_key(files.key.read_bytes(), password=None)
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    p256 = bytes.fromhex("06082a8648ce3d030107")
    assert p256 in der
    unknown = b64encode(der.replace(p256, p256[:-1] + b"\x7f")).decode()
    files.key.write_text(f"-----BEGIN PRIVATE KEY-----\n{unknown}\n-----END PRIVATE KEY-----\n")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda files: files.cert.unlink(), "No such file"),
        (on_an_unknown_curve, "use ECDSA over P-256"),
        (lambda files: files.cert.write_text("no PEM"), "holds no certificate"),
        (lambda files: files.ca.write_text("no PEM"), "holds no certificate"),
        (lambda files: files.key.write_text("no PEM"), "holds no private key"),
        (with_passphrase, "passphrase"),
        (lambda files: files.ca.write_bytes(b"x" * (2 << 20)), "is larger than"),
    ],
)
def test_files_that_cannot_be_used_are_refused(pki: Pki, spoil: Callable[[TlsFiles], object], said: str) -> None:
    files = pki.issue()
    spoil(files)
    with pytest.raises(TlsError, match=said):
        Credentials(files)


def test_certificates_that_nobody_would_accept_are_refused(pki: Pki) -> None:
    with pytest.raises(TlsError, match="expired"):
        Credentials(pki.expired())
    with pytest.raises(TlsError, match="--tls-server-name"):
        Credentials(pki.issue("other", names=("other.example",)))
    Credentials(pki.issue("other", names=("other.example",)), server_name="other.example")
    one, two = pki.issue("one"), pki.issue("two")
    with pytest.raises(TlsError, match="not the key of"):
        Credentials(TlsFiles(cert=one.cert, key=two.key, ca=one.ca))
    with pytest.raises(TlsError, match="holds no certificate"):
        client_credentials(one.key)


# --- until when they are good ----------------------------------------------------------------------------------------


def end_of(path: Path) -> float:
    """When the first certificate of a file ends, in seconds since 1970."""
    return x509.load_pem_x509_certificates(path.read_bytes())[0].not_valid_after_utc.timestamp()


def test_the_end_of_a_certificate_follows_the_files(pki: Pki) -> None:
    credentials = Credentials(pki.issue(lifetime=timedelta(hours=1)), clock=pki.clock)
    first = credentials.expires_s
    assert first == end_of(pki.directory / "service.crt")
    files = pki.issue(lifetime=timedelta(hours=2))
    assert credentials.expires_s == first, "looked at again too soon"
    pki.look()
    assert credentials.expires_s == end_of(files.cert) > first
    renewed = credentials.expires_s
    files.key.write_text("half of a change")
    pki.look()
    assert credentials.expires_s == renewed, "what nobody uses"


def test_a_certificate_ends_with_the_ca_that_signed_it(pki: Pki, other: Pki) -> None:
    files = pki.issue(lifetime=10 * DAY)
    ca_ends_s = end_of(pki.ca)
    assert Credentials(files).expires_s == ca_ends_s < end_of(files.cert)
    # Of another CA of that name that is trusted too nothing depends, and a renewed one is as good as the old.
    sooner = Authority.make("test CA", lifetime=timedelta(hours=1))
    old_ca = pki.ca.read_bytes()
    pki.ca.write_bytes(sooner.certificate.public_bytes(Encoding.PEM) + old_ca)
    assert Credentials(files).expires_s == ca_ends_s
    pki.ca.write_bytes(old_ca + renewed(pki.authority) + other.ca.read_bytes())
    assert Credentials(files).expires_s == ca_ends_s + DAY.total_seconds()


def renewed(authority: Authority) -> bytes:
    """Another certificate of the CA's key, that ends a day later."""
    former = authority.certificate
    return (
        x509.CertificateBuilder()
        .issuer_name(former.issuer)
        .subject_name(former.subject)
        .public_key(authority.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(former.not_valid_before_utc)
        .not_valid_after(former.not_valid_after_utc + DAY)
        .sign(authority.key, SHA256())
        .public_bytes(Encoding.PEM)
    )


def test_a_chain_ends_with_its_first_end(pki: Pki) -> None:
    """Whichever certificate of the file that is."""
    files = pki.issue(lifetime=timedelta(hours=2))
    sooner = pki.issue("sooner", lifetime=timedelta(hours=1))
    files.cert.write_bytes(files.cert.read_bytes() + sooner.cert.read_bytes())
    assert Credentials(files).expires_s == end_of(sooner.cert)


# --- certificates that change ----------------------------------------------------------------------------------------


async def test_a_server_shows_its_new_certificate_and_streams_go_on(pki: Pki) -> None:
    client = pki.issue("client")
    credentials = pki.credentials()
    async with serving(credentials) as address, open_channel(address, Credentials(client)) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert (await watch.read()).status == SERVING
        before = await serial_of(address, pki, client)
        pki.issue("service")
        assert await serial_of(address, pki, client) == before, "looked at again too soon"
        pki.look()
        assert await serial_of(address, pki, client) not in (0, before)
        # The stream that began under the old one.
        assert await ask(channel) == SERVING
        assert not watch.done()
        watch.cancel()


async def test_half_of_a_change_is_not_taken(pki: Pki, caplog: pytest.LogCaptureFixture) -> None:
    client = pki.issue("client")
    credentials = pki.credentials()
    async with serving(credentials) as address:
        before = await serial_of(address, pki, client)
        files = pki.issue("service")
        new_key = files.key.read_bytes()
        files.key.write_text("not yet")
        for _ in range(3):
            pki.look()
            assert await serial_of(address, pki, client) == before
        assert [record.levelname for record in caplog.records].count("ERROR") == 1
        files.key.write_bytes(new_key)
        pki.touch(files.key)
        pki.look()
        assert await serial_of(address, pki, client) != before


async def test_a_pool_connects_anew_with_a_new_certificate(pki: Pki) -> None:
    """Calls that have begun end over the connection that they began on."""
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(serving(pki.credentials("server")))
        credentials = pki.credentials("client")
        pool = ChannelPool(credentials)
        stack.push_async_callback(pool.close)
        first = pool.get(address)
        watch = health_pb2_grpc.HealthStub(first).Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert (await watch.read()).status == SERVING
        assert pool.get(address) is first
        pki.issue("client")
        pki.look()
        second = pool.get(address)
        assert second is not first
        assert await ask(second) == SERVING
        assert not watch.done()
        await pool.close()
        assert await watch.code() is grpc.StatusCode.CANCELLED


async def test_a_ca_is_replaced_in_three_steps(pki: Pki, other: Pki) -> None:
    """Trust both, issue by the new one, trust the new one only. Nobody is refused on the way, and the old one is in the
    end."""
    server, client = pki.credentials("server"), pki.credentials("client")
    old_client = pki.issue("old")
    old_ca = pki.ca.read_bytes()
    async with serving(server) as address:
        pool = ChannelPool(client)

        async def both_agree() -> None:
            pki.touch(pki.ca)
            pki.look()
            assert await ask(pool.get(address)) == SERVING

        try:
            pki.ca.write_bytes(old_ca + other.ca.read_bytes())
            await both_agree()
            for name in ("server", "client"):
                issued = other.issue(name)
                (pki.directory / f"{name}.crt").write_bytes(issued.cert.read_bytes())
                (pki.directory / f"{name}.key").write_bytes(issued.key.read_bytes())
                pki.touch(pki.directory / f"{name}.crt", pki.directory / f"{name}.key")
                await both_agree()
            assert await ask_with(address, old_client, other.ca) is None
            pki.ca.write_bytes(other.ca.read_bytes())
            await both_agree()
            assert await ask_with(address, old_client, other.ca) is grpc.StatusCode.UNAVAILABLE
        finally:
            await pool.close()


async def ask_with(address: str, files: TlsFiles, ca: Path) -> grpc.StatusCode | None:
    """How a call with a certificate fails, None when it does not."""
    async with secure(address, channel_credentials(files, ca)) as channel:
        try:
            await ask(channel)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return None


async def test_https_shows_the_new_certificate_too(pki: Pki) -> None:
    files = pki.issue("router", names=(MESH_NAME, "localhost"), lifetime=timedelta(hours=1))
    credentials = Credentials(files, clock=pki.clock)

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=credentials.for_https())
    async with server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        before = await serial_of(address, pki, name="localhost")
        assert await serial_of(address, pki, name="localhost") == before
        pki.issue("router", names=(MESH_NAME, "localhost"), lifetime=DAY)
        pki.look()
        shown = await serial_of(address, pki, name="localhost")
        assert shown != before
        # Another server of the process has taken a certificate that the files hold no longer.
        pki.issue("router", names=(MESH_NAME, "localhost"), lifetime=DAY)
        pki.look()
        assert credentials.generation == 2
        files.key.write_text("half of a change")
        pki.look()
        assert await serial_of(address, pki, name="localhost") == shown
