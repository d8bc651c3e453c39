"""The ledger in Redis (or Valkey), version 7.0 or newer.

Each operation is one command or one Lua script of ``scripts/``, so it happens as a whole or not at all, on the
server's clock. Keys of one cluster share a hash tag and so one slot:

    {starmesh:CLUSTER}:instances          set of instance ids: which instance keys to look at
    {starmesh:CLUSTER}:instance:ID        hash of registration and last load, expiring together
    {starmesh:CLUSTER}:reservations:ID    hash of request id to "tokens expires_us"
    {starmesh:CLUSTER}:owner:REQUEST      "epoch instance_id"
    {starmesh:CLUSTER}:leader:ROLE        hash of the last leader, its term and the end of its lead; outlives that end
    {starmesh:CLUSTER}:rounds             the rounds of rescheduling that are shown

Nothing is tried twice: a caller with a deadline knows better whether to. Owns no policy and no background task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from starmesh.ledger import (
    InvalidDocument,
    LedgerError,
    LedgerUnavailable,
    OwnershipConflict,
    Refusal,
    ReservationRefused,
)
from starmesh.ledger.codec import (
    decode_count,
    decode_info,
    decode_load,
    decode_ownership,
    decode_rounds,
    encode_info,
    encode_load,
    encode_ownership,
    encode_rounds,
)
from starmesh.ledger.limits import (
    MAX_TTL_S,
    check_claim,
    check_cluster,
    check_epoch,
    check_ids,
    check_info,
    check_load,
    check_reservation,
    check_rounds,
    check_ttl,
)
from starmesh.ledger.redis_password import PasswordFile
from starmesh.loopback import is_loopback_host
from starmesh.rounds import RoundSummary
from starmesh.types import (
    ClusterView,
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    InstanceView,
    Leadership,
    Ownership,
    Reservation,
    Role,
)

DEFAULT_TIMEOUT_S = 1.0
MAX_CONNECTIONS = 16
RENEW_BATCH = 512

_SCRIPTS = (
    *("register", "report", "set_state", "deregister", "view", "reserve", "claim", "renew", "disown"),
    *("lead", "resign", "leader"),
)
_UNAVAILABLE = (
    OSError,
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ClusterDownError,
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
)


class RedisLedger:
    """A ledger shared by all processes that name the same Redis and cluster. Make one with ``connect``."""

    def __init__(self, client: Redis, *, address: str, cluster: str, timeout_s: float) -> None:
        check_cluster(cluster)
        self._client = client
        self._address = address
        self._timeout_s = timeout_s
        self.on_operation: Callable[[str, float, LedgerError | None], None] | None = None
        """Set by a process that measures: hears of each operation's name, its seconds, and its failure if it has one;
        a refusal or a conflict is none."""
        self._running: set[asyncio.Future[Any]] = set()
        self._prefix = f"{{starmesh:{cluster}}}:"
        self._index = self._prefix + "instances"
        folder = files("starmesh.ledger") / "scripts"
        self._scripts = {
            name: client.register_script((folder / f"{name}.lua").read_text(encoding="utf-8")) for name in _SCRIPTS
        }

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        cluster: str = "default",
        password_file: Path | None = None,
        ca: Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Self:
        """A ledger at ``redis://``, ``rediss://`` (TLS) or ``unix://``, credentials in the url; nothing is sent yet.

        ``password_file`` holds the password where the url has none, and is read again for each connection; ``ca`` the
        CAs, in PEM, that a ``rediss://`` server's certificate is checked with, together with the host in the url.
        ``timeout_s`` bounds each operation as a whole, connecting included. Raises LedgerError for a url that cannot be
        understood, no message of which ever shows it, because it may hold a password, and for a file that cannot be
        read.
        """
        options: dict[str, Any] = {}
        if url.startswith("rediss://"):
            options["ssl_check_hostname"] = True
        if ca is not None:
            if not url.startswith("rediss://"):
                raise LedgerError("a CA is given for the ledger, but its url is not rediss://")
            if not ca.is_file():
                raise LedgerError(f"the ledger's CA {ca} is not there")
            options["ssl_ca_certs"] = str(ca)
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                **options,
            )
            if password_file is not None and not pool.connection_kwargs.get("password"):
                # redis-py takes both from a provider, or neither.
                user = pool.connection_kwargs.pop("username", None)
                pool.connection_kwargs["credential_provider"] = PasswordFile(password_file, user=user)
            # An option that redis does not know would otherwise surface at the first operation.
            pool.make_connection()  # type: ignore[no-untyped-call]
            address = _address(url)
        except (ValueError, TypeError, exceptions.RedisError):
            raise LedgerError(
                "the ledger's url is not understood: use redis://[[user]:password@]host:port/db, rediss://... or "
                "unix:///path, and percent-encode special characters of the password"
            ) from None
        return cls(Redis.from_pool(pool), address=address, cluster=cluster, timeout_s=timeout_s)

    def __repr__(self) -> str:
        return f"RedisLedger({self._address}, {self._prefix})"

    async def register(self, info: InstanceInfo, *, ttl_s: float) -> None:
        check_info(info)
        block_tokens = info.layout.block_tokens if info.layout else 0
        await self._run(
            "register",
            [self._index, self._instance(info.instance_id), self._reservations(info.instance_id)],
            [
                check_ttl(ttl_s),
                info.instance_id,
                info.incarnation,
                info.state.value,
                block_tokens,
                encode_info(info),
            ],
        )

    async def report(self, instance_id: str, incarnation: str, load: InstanceLoad, *, ttl_s: float) -> bool:
        check_ids(instance_id, incarnation)
        check_load(load)
        done = await self._run(
            "report",
            [self._index, self._instance(instance_id), self._reservations(instance_id)],
            [
                check_ttl(ttl_s),
                incarnation,
                load.free_blocks,
                encode_load(load),
                *(sequence.request_id for sequence in load.sequences),
            ],
        )
        return bool(done)

    async def set_state(self, instance_id: str, incarnation: str, state: InstanceState) -> bool:
        check_ids(instance_id, incarnation)
        return bool(await self._run("set_state", [self._instance(instance_id)], [incarnation, state.value]))

    async def deregister(self, instance_id: str, incarnation: str) -> None:
        check_ids(instance_id, incarnation)
        keys = [self._index, self._instance(instance_id), self._reservations(instance_id)]
        await self._run("deregister", keys, [instance_id, incarnation])

    async def view(self) -> ClusterView:
        now_us, *rows = await self._run("view", [self._index], [self._instance(""), self._reservations("")])
        instances = sorted((_instance_view(row) for row in rows), key=lambda view: view.info.instance_id)
        return ClusterView(now_s=_seconds(now_us), instances=tuple(instances))

    async def reserve(self, request_id: str, instance_id: str, tokens: int, *, limit_tokens: int, ttl_s: float) -> None:
        check_ids(request_id, instance_id)
        check_reservation(tokens, limit_tokens)
        answer: bytes = await self._run(
            "reserve",
            [self._instance(instance_id), self._reservations(instance_id)],
            [check_ttl(ttl_s), request_id, tokens, limit_tokens],
        )
        if answer != b"ok":
            raise ReservationRefused(instance_id, Refusal(answer.decode()))

    async def release(self, request_id: str, instance_id: str) -> None:
        check_ids(request_id, instance_id)
        await self._measured("release", self._client.hdel(self._reservations(instance_id), request_id))

    async def claim(
        self, request_id: str, instance_id: str, *, expected: Ownership | None, epoch: int, ttl_s: float
    ) -> None:
        check_ids(request_id, instance_id)
        check_claim(expected, epoch)
        done, found = await self._run(
            "claim",
            [self._owner(request_id)],
            [
                check_ttl(ttl_s),
                "" if expected is None else encode_ownership(expected),
                encode_ownership(Ownership(instance_id, epoch)),
            ],
        )
        if not done:
            raise OwnershipConflict(request_id, decode_ownership(found) if found else None)

    async def owner(self, request_id: str) -> Ownership | None:
        check_ids(request_id)
        found = await self._measured("owner", self._client.get(self._owner(request_id)))
        return None if found is None else decode_ownership(found)

    async def renew(self, owned: dict[str, int], *, ttl_s: float) -> list[str]:
        check_ids(*owned)
        for epoch in owned.values():
            check_epoch(epoch)
        ttl_ms = check_ttl(ttl_s)
        # In batches: a script stops the server for as long as it runs.
        request_ids = list(owned)
        missing: list[str] = []
        for start in range(0, len(request_ids), RENEW_BATCH):
            batch = request_ids[start : start + RENEW_BATCH]
            keys = [self._owner(request_id) for request_id in batch]
            absent = await self._run("renew", keys, [ttl_ms, *(owned[request_id] for request_id in batch)])
            missing += [batch[place - 1] for place in absent]
        return missing

    async def disown(self, request_id: str, epoch: int) -> None:
        check_ids(request_id)
        check_epoch(epoch)
        await self._run("disown", [self._owner(request_id)], [epoch])

    async def lead(self, role: Role, instance_id: str, incarnation: str, *, ttl_s: float) -> int | None:
        check_ids(instance_id, incarnation)
        ttl_ms = check_ttl(ttl_s)
        # Longer than any lead: by its end the clock alone is above the last term.
        keep_ms = 2 * check_ttl(MAX_TTL_S)
        term = await self._run("lead", [self._leader(role)], [ttl_ms, keep_ms, instance_id, incarnation])
        return None if term is None else decode_count(term, "leader: term")

    async def resign(self, role: Role, instance_id: str, incarnation: str) -> None:
        check_ids(instance_id, incarnation)
        await self._run("resign", [self._leader(role)], [instance_id, incarnation])

    async def leader(self, role: Role) -> Leadership | None:
        found = await self._run("leader", [self._leader(role)], [])
        if found is None:
            return None
        instance_id, term = found
        return Leadership(instance_id.decode(errors="replace"), decode_count(term, "leader: term"))

    async def publish_rounds(self, rounds: Sequence[RoundSummary], *, ttl_s: float) -> None:
        check_rounds(rounds)
        await self._measured(
            "publish_rounds", self._client.set(self._prefix + "rounds", encode_rounds(rounds), px=check_ttl(ttl_s))
        )

    async def rounds(self) -> tuple[RoundSummary, ...]:
        found = await self._measured("rounds", self._client.get(self._prefix + "rounds"))
        return () if found is None else decode_rounds(found)

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=self._timeout_s)
        await self._client.aclose()

    def _instance(self, instance_id: str) -> str:
        return f"{self._prefix}instance:{instance_id}"

    def _reservations(self, instance_id: str) -> str:
        return f"{self._prefix}reservations:{instance_id}"

    def _leader(self, role: Role) -> str:
        return f"{self._prefix}leader:{role.value}"

    def _owner(self, request_id: str) -> str:
        return f"{self._prefix}owner:{request_id}"

    async def _run(self, script: str, keys: list[str], arguments: Iterable[str | int]) -> Any:
        """Run a script by its digest; the server is sent the text when it does not have it."""
        return await self._measured(script, self._scripts[script](keys=keys, args=list(arguments)))

    async def _measured(self, name: str, operation: Awaitable[Any]) -> Any:
        """Run an operation, and tell whoever measures how it went."""
        if self.on_operation is None:
            return await self._call(operation)
        began_s = time.monotonic()
        failure: LedgerError | None = None
        try:
            return await self._call(operation)
        except LedgerError as error:
            failure = error
            raise
        finally:
            self.on_operation(name, time.monotonic() - began_s, failure)

    async def _call(self, operation: Awaitable[Any]) -> Any:
        """Bound an operation in time and name its failure in the ledger's terms, without the url.

        The operation has a task of its own, which outlives a caller that is cancelled. Cancelled inside redis-py, a
        call may swallow the cancellation (through asyncio.wait_for, before Python 3.12) or turn it into a lost
        connection; a caller's ``cancel`` or ``asyncio.timeout`` must not depend on that.
        """
        task = asyncio.ensure_future(operation)
        self._running.add(task)
        deadline = asyncio.get_running_loop().call_later(self._timeout_s, task.cancel)

        def ended(task: asyncio.Future[Any]) -> None:
            deadline.cancel()
            self._running.discard(task)
            if not task.cancelled():
                # Seen, also when the caller has gone.
                task.exception()

        task.add_done_callback(ended)
        await asyncio.wait({task}, timeout=self._timeout_s)
        if not task.done() or task.cancelled():
            raise LedgerUnavailable(f"the ledger at {self._address} did not answer within {self._timeout_s} s")
        try:
            return task.result()
        except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
            raise LedgerUnavailable(
                f"the ledger at {self._address} refuses user or password, or the user may not do all that is needed "
                "(docs/security.md has the ACL line)"
            ) from error
        except _UNAVAILABLE as error:
            raise LedgerUnavailable(f"the ledger at {self._address} is not available: {error}") from error
        except exceptions.RedisError as error:
            if str(error).startswith(("INVALID", "WRONGTYPE")):
                raise InvalidDocument(f"the ledger at {self._address} holds a foreign document: {error}") from error
            raise LedgerError(f"the ledger at {self._address} failed: {error}") from error


def is_encrypted(url: str) -> bool:
    """Whether what is sent to a ledger cannot be read on a network: TLS, or it never leaves this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or "localhost"
    except ValueError:
        return True  # not understood: ``connect`` says so
    return parts.scheme != "redis" or is_loopback_host(host)


def _address(url: str) -> str:
    """Where the ledger is, for people: the url without credentials and options."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    return f"{parts.scheme}://{parts.hostname or 'localhost'}:{parts.port or 6379}"


def _seconds(microseconds: bytes) -> float:
    return decode_count(microseconds, "time") / 1e6


def _instance_view(row: list[Any]) -> InstanceView:
    """One row of the view script. Raises InvalidDocument naming the instance."""
    instance_id, state, info, load, reported_at_us, reservations = row
    name = instance_id.decode(errors="replace")
    try:
        view = InstanceView(
            info=decode_info(info, state or b""),
            load=None if load is None else decode_load(load),
            reported_at_s=0.0 if reported_at_us is None else _seconds(reported_at_us),
            reservations=tuple(
                Reservation(
                    request_id=request_id.decode(errors="replace"),
                    instance_id=name,
                    tokens=decode_count(tokens, "reservation: tokens"),
                    expires_at_s=_seconds(expires_us),
                )
                for request_id, tokens, expires_us in sorted(zip(*[iter(reservations)] * 3, strict=True))
            ),
        )
    except InvalidDocument as error:
        raise InvalidDocument(f"instance {name}: {error}") from None
    if view.info.instance_id != name:
        raise InvalidDocument(f"instance {name}: its registration names {view.info.instance_id[:160]}")
    return view
