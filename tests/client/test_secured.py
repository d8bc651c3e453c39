"""TLS and API keys, as the client has them."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from starmesh.client import Client, ClientError, RetryPolicy
from starmesh.rpc.credentials import MESH_NAME
from tests.client.conftest import Surroundings, read
from tests.router.conftest import Mesh, text_of, tokens_after, until
from tests.router.test_resume import key_file
from tests.rpc.pki import Pki

ONCE = RetryPolicy(max_retries=0)


async def error_of(client: Client) -> ClientError:
    with pytest.raises(ClientError) as caught:
        await client.text("hello")
    return caught.value


async def test_a_router_with_a_certificate_and_keys(mesh: Mesh, surroundings: Surroundings, tmp_path: Path) -> None:
    for name in ("ours", "other"):
        (tmp_path / name).mkdir()
    pki, other = Pki(tmp_path / "ours"), Pki(tmp_path / "other")
    files = pki.issue(names=(MESH_NAME, "127.0.0.1"))
    tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}
    # Without instances: that there are none is the word of a router that has let the request in.
    await mesh.start(prefills=0, decodes=0, absent_timeout_s=0.0, api_keys=key_file(tmp_path, "alice"), **tls)
    let_in = await error_of(await surroundings.client(tls_ca=pki.ca, api_key="sm-alice", retries=ONCE))
    assert (let_in.code, let_in.retry_delay_s) == (grpc.StatusCode.UNAVAILABLE, 1.0)
    for key in ("", "sm-bob"):
        refused = await error_of(await surroundings.client(tls_ca=pki.ca, api_key=key))
        assert refused.code is grpc.StatusCode.UNAUTHENTICATED
        assert "API key" in refused.message
    for ca in (other.ca, None):
        unknown = await error_of(await surroundings.client(tls_ca=ca, retries=ONCE))
        assert (unknown.code, unknown.retry_delay_s) == (grpc.StatusCode.UNAVAILABLE, None)


async def test_each_of_a_clients_calls_has_its_key(mesh: Mesh, surroundings: Surroundings, tmp_path: Path) -> None:
    await mesh.start(api_keys=key_file(tmp_path, "alice"))
    mesh.decodes[0].pause_after = 5
    relay = await surroundings.relay()
    client = await surroundings.client(relay.address, api_key="sm-alice")
    stream = client.generate("hello", max_output_tokens=20)
    text = (await anext(stream)).text
    relay.cut()
    mesh.decodes[0].resume()
    assert text + (await stream.whole()).text == text_of(tokens_after("hello", 20))
    mesh.decodes[0].pause_after = 5
    async with client.generate("hello", request_id="left", max_output_tokens=20) as stream:
        await read(stream, 5)
    await until(lambda: mesh.decodes[0].cancelled == [("left", 1)])  # and not after the window only
    await mesh.nothing_left()


async def test_what_is_wrong_here_is_said_before_anything_is_sent(tmp_path: Path) -> None:
    key = "sm-secret"
    client = Client("router.example:50051", api_key=key)
    error = await error_of(client)
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "unencrypted" in error.message
    assert key not in repr(client) + str(error)
    assert (await error_of(Client("localhost:1", tls_ca=tmp_path / "none.crt"))).code is (
        grpc.StatusCode.FAILED_PRECONDITION
    )
