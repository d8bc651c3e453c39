"""The Redis ledger when its server dies, hangs, is not ours, or holds what is not ours."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from starmesh.ledger import InvalidDocument, LedgerError, LedgerUnavailable, Refusal, ReservationRefused
from starmesh.ledger.redis import RedisLedger
from starmesh.ledger.server import EmbeddedServer
from starmesh.types import Ownership, Role

from .conformance import LONG_S, instance, load
from .conftest import TIMEOUT_S, WAIT_S, until

SECRET = "hunter2-secret"


@pytest.fixture
async def own_server() -> AsyncIterator[EmbeddedServer]:
    async with await EmbeddedServer.start() as running:
        yield running


@pytest.fixture
async def raw(server: EmbeddedServer) -> AsyncIterator[Redis]:
    client = Redis.from_url(server.url)
    yield client
    await client.aclose()


async def test_killed_server_is_unavailable_at_once(own_server: EmbeddedServer) -> None:
    ledger = RedisLedger.connect(own_server.url, timeout_s=30.0)
    await ledger.register(instance(), ttl_s=LONG_S)
    os.kill(own_server.pid, signal.SIGKILL)
    for call in (
        ledger.view(),
        ledger.register(instance(), ttl_s=1),
        ledger.report("decode-0", "one", load(), ttl_s=1),
        ledger.reserve("r", "decode-0", 1, limit_tokens=1, ttl_s=1),
        ledger.release("r", "decode-0"),
        ledger.claim("r", "decode-0", expected=None, epoch=1, ttl_s=1),
        ledger.owner("r"),
        ledger.renew({"r": 1}, ttl_s=1),
        ledger.disown("r", 1),
        ledger.lead(Role.RESCHEDULER, "r", "one", ttl_s=1),
        ledger.resign(Role.RESCHEDULER, "r", "one"),
        ledger.leader(Role.RESCHEDULER),
        ledger.deregister("decode-0", "one"),
    ):
        # Far below timeout_s: a refused connection is not tried again.
        async with asyncio.timeout(10):
            with pytest.raises(LedgerUnavailable):
                await call
    await ledger.close()


@pytest.mark.parametrize("tcp", [False, True], ids=["socket", "tcp"])
async def test_server_that_restarts_empty_is_used_again(tcp: bool) -> None:
    async with await EmbeddedServer.start(tcp=tcp) as own:
        ledger = RedisLedger.connect(own.url, timeout_s=10.0)
        await ledger.register(instance(), ttl_s=LONG_S)
        await ledger.claim("r", "decode-0", expected=None, epoch=1, ttl_s=LONG_S)
        term = await ledger.lead(Role.RESCHEDULER, "a", "one", ttl_s=LONG_S)
        os.kill(own.pid, signal.SIGKILL)
        await own.restart()
        assert (await ledger.view()).instances == ()
        assert not await ledger.report("decode-0", "one", load(), ttl_s=LONG_S)
        assert await ledger.owner("r") is None
        later = await ledger.lead(Role.RESCHEDULER, "b", "one", ttl_s=LONG_S)
        assert term is not None and later is not None and later > term
        await ledger.register(instance(), ttl_s=LONG_S)
        assert await ledger.report("decode-0", "one", load(), ttl_s=LONG_S)
        await ledger.reserve("r", "decode-0", 1, limit_tokens=1, ttl_s=LONG_S)
        await ledger.close()


async def test_hanging_server_is_unavailable_within_the_timeout(own_server: EmbeddedServer) -> None:
    ledger = RedisLedger.connect(own_server.url, timeout_s=0.1)

    async def answers() -> bool:
        try:
            await ledger.view()
        except LedgerUnavailable:  # on a busy machine it may take longer
            return False
        return True

    await until(answers)
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(20):
            with pytest.raises(LedgerUnavailable):
                await ledger.view()
            with pytest.raises(LedgerUnavailable):
                await ledger.owner("r")
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    await ledger.close()


async def test_address_without_a_server_is_unavailable() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        ledger = RedisLedger.connect(f"redis://user:{SECRET}@127.0.0.1:{probe.getsockname()[1]}/0", timeout_s=30.0)
        async with asyncio.timeout(10):
            with pytest.raises(LedgerUnavailable, match=r"127\.0\.0\.1") as failed:
                await ledger.view()
    assert SECRET not in f"{failed.value!r} {ledger!r} {failed.value.__cause__!r}"
    await ledger.close()


async def test_wrong_password_is_named_as_such() -> None:
    async with await EmbeddedServer.start(tcp=True) as own:
        host = own.url.rpartition("@")[2]
        for url in (f"redis://:{SECRET}@{host}", f"redis://{host}"):
            ledger = RedisLedger.connect(url, timeout_s=TIMEOUT_S)
            with pytest.raises(LedgerUnavailable, match="refuses user or password") as failed:
                await ledger.view()
            assert SECRET not in f"{failed.value!r} {failed.value.__cause__!r}"
            await ledger.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        SECRET,
        f"http://:{SECRET}@host",
        f"redis://:{SECRET}/x@host:6379/0",
        f"redis://host:{SECRET}/0",
        f"redis://:{SECRET}@host/0?socket_timeout=soon",
        f"redis://host/0?{SECRET}=1",
    ],
)
def test_bad_url_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(LedgerError, match="redis://") as refused:
        RedisLedger.connect(url)
    assert SECRET not in str(refused.value) and refused.value.__cause__ is None


def test_address_is_shown_without_credentials() -> None:
    for url, address in (
        (f"redis://u:{SECRET}@h:1/2", "redis://h:1"),
        (f"rediss://:{SECRET}@h", "rediss://h:6379"),
        (f"unix://:{SECRET}@/run/redis.sock?db=3", "unix:///run/redis.sock"),
    ):
        shown = repr(RedisLedger.connect(url, cluster="blue"))
        assert address in shown and "{starmesh:blue}" in shown and SECRET not in shown


def test_cluster_name_cannot_leave_its_hash_tag(server: EmbeddedServer) -> None:
    for name in ("", "a}b", "a b", "a" * 65):
        with pytest.raises(ValueError, match="cluster name"):
            RedisLedger.connect(server.url, cluster=name)


async def test_clusters_do_not_see_each_other(server: EmbeddedServer, redis_ledger: RedisLedger) -> None:
    other = RedisLedger.connect(server.url, cluster="another", timeout_s=TIMEOUT_S)
    await redis_ledger.register(instance(), ttl_s=LONG_S)
    await redis_ledger.claim("r", "a", expected=None, epoch=1, ttl_s=LONG_S)
    assert (await other.view()).instances == ()
    assert await other.owner("r") is None
    await other.close()


async def test_scripts_survive_a_flush_of_the_script_cache(redis_ledger: RedisLedger, raw: Redis) -> None:
    await redis_ledger.register(instance(), ttl_s=LONG_S)
    await raw.script_flush()
    await redis_ledger.register(instance(), ttl_s=LONG_S)
    assert len((await redis_ledger.view()).instances) == 1


async def test_every_key_expires_and_shares_one_hash_tag(redis_ledger: RedisLedger, raw: Redis, cluster: str) -> None:
    await redis_ledger.register(instance(), ttl_s=LONG_S)
    await redis_ledger.report("decode-0", "one", load(), ttl_s=2 * LONG_S)
    await redis_ledger.reserve("r", "decode-0", 1, limit_tokens=1, ttl_s=LONG_S)
    await redis_ledger.claim("r", "decode-0", expected=None, epoch=1, ttl_s=LONG_S)
    await redis_ledger.lead(Role.RESCHEDULER, "a", "one", ttl_s=LONG_S)
    tag = f"{{starmesh:{cluster}}}:"
    expiry_ms = {
        key.decode().removeprefix(tag): await raw.pexpiretime(key) async for key in raw.scan_iter(f"*{cluster}*")
    }
    assert set(expiry_ms) == {
        *("instances", "instance:decode-0", "reservations:decode-0", "owner:r", "leader:rescheduler")
    }
    assert all(at_ms > 0 for at_ms in expiry_ms.values())
    assert expiry_ms["instances"] >= expiry_ms["instance:decode-0"] > expiry_ms["reservations:decode-0"]


async def test_cancelled_calls_do_not_cross_answers(redis_ledger: RedisLedger) -> None:
    for i in range(40):
        await redis_ledger.claim(f"r{i}", f"d{i}", expected=None, epoch=1, ttl_s=LONG_S)
    for turns in range(12):
        calls = [asyncio.create_task(redis_ledger.owner(f"r{i}")) for i in range(40)]
        for _ in range(turns):
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for i, outcome in enumerate(outcomes):
            assert outcome == Ownership(f"d{i}", 1) or (i % 2 == 0 and isinstance(outcome, asyncio.CancelledError))
        assert await redis_ledger.owner("r7") == Ownership("d7", 1)


async def test_a_cancelled_caller_is_cancelled_every_time(redis_ledger: RedisLedger) -> None:
    async def ask_forever() -> None:
        while True:
            await redis_ledger.owner("r")

    for turn in range(200):
        asking = asyncio.create_task(ask_forever())
        # Another point of the call each time.
        for _ in range(turn % 23):
            await asyncio.sleep(0)
        await asyncio.sleep(turn % 7 * 1e-4)
        asking.cancel()
        done, _ = await asyncio.wait({asking}, timeout=WAIT_S)
        assert done and asking.cancelled(), f"turn {turn}"
    assert await redis_ledger.owner("r") is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("info", b"\xff\x00 not json"),
        ("info", b"[]"),
        ("info", b'{"version":2}'),
        ("info", b'{"version":1}'),
        ("state", b"asleep"),
        ("load", b"gAN9cQAu"),
        ("load", b'{"version":1,"total_blocks":NaN}'),
        ("load", b"{" * 100_000),
        ("reported_at_us", b"yesterday"),
    ],
)
async def test_foreign_documents_are_refused(
    redis_ledger: RedisLedger, raw: Redis, cluster: str, field: str, value: bytes
) -> None:
    await redis_ledger.register(instance(), ttl_s=LONG_S)
    await redis_ledger.report("decode-0", "one", load(), ttl_s=LONG_S)
    await raw.hset(f"{{starmesh:{cluster}}}:instance:decode-0", field, value)
    with pytest.raises(InvalidDocument, match="decode-0"):
        await redis_ledger.view()
    # The instance itself mends it.
    await redis_ledger.register(instance(), ttl_s=LONG_S)
    await redis_ledger.report("decode-0", "one", load(), ttl_s=LONG_S)
    assert len((await redis_ledger.view()).instances) == 1


async def test_document_of_another_instance_is_refused(redis_ledger: RedisLedger, raw: Redis, cluster: str) -> None:
    for name in ("a", "b"):
        await redis_ledger.register(instance(name), ttl_s=LONG_S)
    document = await raw.hget(f"{{starmesh:{cluster}}}:instance:a", "info")
    assert isinstance(document, bytes)
    assert json.loads(document)["instance_id"] == "a"
    await raw.hset(f"{{starmesh:{cluster}}}:instance:b", "info", document)
    with pytest.raises(InvalidDocument, match="instance b"):
        await redis_ledger.view()


async def test_foreign_reservations_and_owners_are_refused(redis_ledger: RedisLedger, raw: Redis, cluster: str) -> None:
    prefix = f"{{starmesh:{cluster}}}:"
    await redis_ledger.register(instance(), ttl_s=LONG_S)
    await raw.hset(prefix + "reservations:decode-0", "r", "many")
    with pytest.raises(InvalidDocument):
        await redis_ledger.view()
    with pytest.raises(InvalidDocument):
        await redis_ledger.reserve("s", "decode-0", 1, limit_tokens=1, ttl_s=LONG_S)
    await raw.set(prefix + "reservations:decode-0", "of another type")
    with pytest.raises(InvalidDocument):
        await redis_ledger.reserve("s", "decode-0", 1, limit_tokens=1, ttl_s=LONG_S)
    for value in ("nobody", "x d0", "1", "99999999999999999999 d0"):
        await raw.set(prefix + "owner:r", value)
        with pytest.raises(InvalidDocument):
            await redis_ledger.owner("r")
        with pytest.raises(InvalidDocument):
            await redis_ledger.claim("r", "d1", expected=None, epoch=1, ttl_s=LONG_S)


@pytest.mark.parametrize(
    "fields", [{"term": "soon"}, {"term": "", "instance_id": "a"}, {"expires_ms": "", "instance_id": "a"}, "a string"]
)
async def test_a_foreign_leader_is_refused(
    redis_ledger: RedisLedger, raw: Redis, cluster: str, fields: dict[str, str] | str
) -> None:
    key = f"{{starmesh:{cluster}}}:leader:rescheduler"
    if isinstance(fields, str):
        await raw.set(key, fields)
    else:
        await raw.hset(key, mapping={"term": "7", "expires_ms": str(2**52)} | fields)
    with pytest.raises(InvalidDocument):
        await redis_ledger.leader(Role.RESCHEDULER)
    with pytest.raises(InvalidDocument):
        await redis_ledger.lead(Role.RESCHEDULER, "a", "one", ttl_s=LONG_S)


async def test_unready_blocks_of_a_foreign_load_are_refused(
    redis_ledger: RedisLedger, raw: Redis, cluster: str
) -> None:
    await redis_ledger.register(instance(), ttl_s=LONG_S)
    await raw.hset(f"{{starmesh:{cluster}}}:instance:decode-0", "free_blocks", "plenty")
    with pytest.raises(InvalidDocument):
        await redis_ledger.reserve("r", "decode-0", 1, limit_tokens=1, ttl_s=LONG_S)
    with pytest.raises(ReservationRefused) as refused:
        await redis_ledger.reserve("r", "decode-1", 1, limit_tokens=1, ttl_s=LONG_S)
    assert refused.value.reason is Refusal.NOT_REGISTERED
