"""API keys at the router's gRPC port: every RPC of every service that it serves, with every wrong key there is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from starmesh.rpc.key_file import ApiKey, Scope, digest_of, new_secret, write_keys
from starmesh.rpc.status import from_rpc_error, from_sequence_status
from starmesh.v1 import cluster_pb2, inference_pb2
from tests.router.conftest import Mesh, check_answer, generate_request, until
from tests.rpc.every_rpc import HEALTH, REFLECTION, SERVICES, Rpc, attempt, served_by

INFERENCE, CLUSTER = "starmesh.v1.InferenceService", "starmesh.v1.ClusterService"
BOTH = frozenset(Scope)
# These go on for those who have used up their limits: to end what runs, to read on, to begin a stream whose requests
# are counted one by one, to learn what the model is.
UNCOUNTED = {(INFERENCE, method) for method in ("Cancel", "Resume", "GenerateMany", "GetModel")}
MESSAGES = {(INFERENCE, "Generate"): generate_request().SerializeToString()}


class Keys:
    """The router's file of keys and what their holders send."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "keys"
        self._keys: dict[str, ApiKey] = {}
        self._secrets: dict[str, str] = {}
        write_keys(self.path, ())

    def add(self, key_id: str, scopes: frozenset[Scope] = BOTH, **limits: Any) -> tuple[tuple[str, str], ...]:
        secret = self._secrets[key_id] = new_secret()
        self._keys[key_id] = ApiKey(key_id=key_id, sha256=digest_of(secret), scopes=scopes, **limits)
        write_keys(self.path, tuple(self._keys.values()))
        return sent(secret)

    def revoke(self, key_id: str) -> None:
        del self._keys[key_id]
        write_keys(self.path, tuple(self._keys.values()))


def sent(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
async def guarded(mesh: Mesh, keys: Keys) -> AsyncIterator[Mesh]:
    """A router with keys. New ones are read when a test says so, and otherwise within a second."""
    await mesh.start(api_keys=keys.path)
    yield mesh


def reread(mesh: Mesh) -> None:
    assert mesh.process.keys is not None
    mesh.process.keys.refresh()


async def everything(mesh: Mesh, keys: Keys) -> list[Rpc]:
    """All RPCs that the router serves beside health."""
    anyone = keys.add("lists")
    reread(mesh)
    services = await served_by(mesh.channel, metadata=anyone)
    assert services == {INFERENCE, CLUSTER, HEALTH, REFLECTION}, "say in services.router.access what it needs"
    return [rpc for service in services - {HEALTH} for rpc in SERVICES[service]]


async def codes(mesh: Mesh, rpcs: list[Rpc], metadata: Any) -> dict[str, grpc.StatusCode]:
    """How each ends with a valid message, where an empty one is none."""
    return {
        rpc.path: await attempt(mesh.channel, rpc, MESSAGES.get((rpc.service, rpc.method), b""), metadata=metadata)
        for rpc in rpcs
    }


async def test_nothing_but_health_is_open_to_those_without_a_valid_key(guarded: Mesh, keys: Keys) -> None:
    rpcs = await everything(guarded, keys)
    revoked = keys.add("revoked")
    reread(guarded)
    assert await attempt(guarded.channel, rpcs[0], metadata=revoked) is not grpc.StatusCode.UNAUTHENTICATED
    keys.revoke("revoked")
    wrong = {
        "none": None,
        "empty": (("authorization", ""),),
        "not a key": (("authorization", "Basic YWxpY2U6c2VjcmV0"),),
        "unknown": sent(new_secret()),
        "in the wrong place": (("api-key", new_secret()),),
        "revoked": revoked,
        "expired": keys.add("expired", expires=datetime.now(UTC) - timedelta(seconds=1)),
    }
    reread(guarded)
    for kind, metadata in wrong.items():
        found = await codes(guarded, rpcs, metadata)
        assert set(found.values()) == {grpc.StatusCode.UNAUTHENTICATED}, (kind, found)
    for rpc in SERVICES[HEALTH]:
        assert await attempt(guarded.channel, rpc) in (grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED)
    await guarded.nothing_left()


@pytest.mark.parametrize(
    ("scope", "allowed", "denied"), [(Scope.GENERATE, INFERENCE, CLUSTER), (Scope.OPERATE, CLUSTER, INFERENCE)]
)
async def test_a_key_opens_what_its_scopes_say(
    guarded: Mesh, keys: Keys, scope: Scope, allowed: str, denied: str
) -> None:
    rpcs = await everything(guarded, keys)
    found = await codes(guarded, rpcs, keys_of(guarded, keys, scope))
    for rpc in rpcs:
        code = found[rpc.path]
        if rpc.service == denied:
            assert code is grpc.StatusCode.PERMISSION_DENIED, rpc
        else:
            assert rpc.service in (allowed, REFLECTION)
            assert code not in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED), rpc


def keys_of(mesh: Mesh, keys: Keys, scope: Scope) -> tuple[tuple[str, str], ...]:
    metadata = keys.add(scope.value, frozenset({scope}))
    reread(mesh)
    return metadata


async def test_every_call_counts_against_the_rate(guarded: Mesh, keys: Keys) -> None:
    rpcs = await everything(guarded, keys)
    slow = keys.add("slow", requests_per_s=0.001)
    reread(guarded)
    await guarded.inference.GetModel(inference_pb2.GetModelRequest(), metadata=slow)
    check_answer(
        [message async for message in guarded.inference.Generate(generate_request(), metadata=slow)], "hello", 20
    )
    found = await codes(guarded, rpcs, slow)
    for rpc in rpcs:
        counted = rpc.service != REFLECTION and (rpc.service, rpc.method) not in UNCOUNTED
        assert (found[rpc.path] is grpc.StatusCode.RESOURCE_EXHAUSTED) == counted, rpc
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await guarded.cluster.ListInstances(cluster_pb2.ListInstancesRequest(), metadata=slow)
    delay_s = from_rpc_error(caught.value).retry_delay_s
    assert delay_s is not None and 900 < delay_s <= 1000


async def test_a_stream_holds_its_place_until_it_ends(guarded: Mesh, keys: Keys) -> None:
    """An answer as well as a watch; however it ends."""
    key = keys.add("one", max_requests=1)
    reread(guarded)
    guarded.decodes[0].pause_after = 3
    answer = guarded.inference.Generate(generate_request(), timeout=20, metadata=key)
    await answer.read()
    assert await code_of(guarded.inference.Generate(generate_request(), metadata=key)) == "RESOURCE_EXHAUSTED"
    assert await code_of(guarded.cluster.WatchCluster(cluster_pb2.WatchClusterRequest(), metadata=key)) == (
        "RESOURCE_EXHAUSTED"
    )
    answer.cancel()
    guarded.decodes[0].resume()
    await guarded.nothing_left()
    watch = guarded.cluster.WatchCluster(cluster_pb2.WatchClusterRequest(), timeout=20, metadata=key)
    await watch.read()
    assert await code_of(guarded.inference.Generate(generate_request(), metadata=key)) == "RESOURCE_EXHAUSTED"
    watch.cancel()
    usage = guarded.process.keys
    assert usage is not None
    await until(lambda: not in_flight(guarded))
    messages = [message async for message in guarded.inference.Generate(generate_request(), metadata=key)]
    check_answer(messages, "hello", 20)


def in_flight(mesh: Mesh) -> int:
    assert mesh.process.keys is not None
    return sum(usage.in_flight for usage in mesh.process.keys._usages.values())


async def code_of(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return str(caught.value.code().name)


async def test_each_request_of_a_shared_stream_is_counted(guarded: Mesh, keys: Keys) -> None:
    key = keys.add("two", max_requests=2)
    reread(guarded)
    guarded.decodes[0].pause_after = 1
    call = guarded.inference.GenerateMany(timeout=20, metadata=key)
    for name in ("a", "b", "c"):
        await call.write(inference_pb2.GenerateManyRequest(generate=generate_request(request_id=name)))
    failure = None
    while failure is None:
        for failure in (await call.read()).failures:
            assert failure.request_id == "c"
    assert from_sequence_status(failure.status).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    keys.revoke("two")
    reread(guarded)
    # What runs goes on; nothing new begins.
    await call.write(inference_pb2.GenerateManyRequest(generate=generate_request(request_id="d")))
    guarded.decodes[0].resume()
    ended: dict[str, grpc.StatusCode | None] = {}
    while set(ended) != {"a", "b", "d"}:
        response = await call.read()
        ended |= {failure.request_id: from_sequence_status(failure.status).code for failure in response.failures}
        ended |= {answer.request_id: None for answer in response.responses if answer.finish_reason}
    assert ended == {"a": None, "b": None, "d": grpc.StatusCode.UNAUTHENTICATED}
    await call.done_writing()
    await guarded.nothing_left()


async def test_the_file_is_followed(guarded: Mesh, keys: Keys) -> None:
    """By itself, while the router runs."""
    key = keys.add("new")

    async def model() -> grpc.StatusCode:
        return await attempt(
            guarded.channel, next(r for r in SERVICES[INFERENCE] if r.method == "GetModel"), metadata=key
        )

    assert guarded.process.keys is not None
    await until(lambda: len(guarded.process.keys or ()) == 1)
    assert await model() is grpc.StatusCode.OK
    keys.revoke("new")
    await until(lambda: len(guarded.process.keys or ()) == 0)
    assert await model() is grpc.StatusCode.UNAUTHENTICATED


async def test_without_a_file_everybody_is_let_in(mesh: Mesh) -> None:
    await mesh.start()
    assert mesh.process.keys is None
    check_answer([message async for message in mesh.generate()], "hello", 20)
