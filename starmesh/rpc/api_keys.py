"""Who may call the router, for what, and how often: API keys at run time, the same for gRPC and HTTP.

Owns the check of a call's key, its rate, its requests in flight, and following the file. Owns neither the file's format
(``key_file``) nor which call needs which scope (the services that ask).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from starmesh.rpc.key_file import KEY_PREFIX, ApiKey, KeyFileError, Scope, digest_of, read_keys
from starmesh.rpc.status import StatusError, retry_later

__all__ = ["Admission", "ApiKeys", "KeyFileError", "Scope"]

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
"""Seconds between two looks at the file: what a revoked key still lives."""
BUSY_RETRY_S = 1.0
"""What a caller is told to wait when all its requests in flight are taken: nobody knows when one ends."""
MAX_AUTHORIZATION_CHARS = 256


class _Usage:
    """What one key has in flight and may still start now: a token bucket of one second's requests."""

    __slots__ = ("in_flight", "key", "seen_s", "tokens")

    def __init__(self, key: ApiKey, now_s: float) -> None:
        self.key = key
        self.in_flight = 0
        self.tokens = self._capacity
        self.seen_s = now_s

    @property
    def _capacity(self) -> float:
        return max(1.0, self.key.requests_per_s or 0.0)

    def take(self, now_s: float) -> None:
        """Count one request. Raises StatusError when that is one too many."""
        key = self.key
        if key.max_requests is not None and self.in_flight >= key.max_requests:
            raise retry_later(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{key.max_requests} requests of this API key are running, which is its limit; try again later",
                BUSY_RETRY_S,
            )
        if key.requests_per_s is not None:
            # A clock that was set back refills nothing, and from then on as usual.
            gained = max(0.0, now_s - self.seen_s) * key.requests_per_s
            self.tokens = min(self._capacity, self.tokens + gained)
            self.seen_s = now_s
            if self.tokens < 1.0:
                raise retry_later(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"more than {key.requests_per_s:g} requests/s with this API key; try again later",
                    (1.0 - self.tokens) / key.requests_per_s,
                )
            self.tokens -= 1.0
        self.in_flight += 1


class Admission:
    """One admitted request. A context manager, or ``close``, gives its place in flight back."""

    __slots__ = ("_usage", "key_id")

    def __init__(self, usage: _Usage) -> None:
        self.key_id = usage.key.key_id
        self._usage: _Usage | None = usage

    def close(self) -> None:
        """The request has ended. May be repeated."""
        if self._usage is not None:
            self._usage.in_flight -= 1
            self._usage = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class ApiKeys:
    """The keys of one file and what each has in flight, for the calls of one event loop. Make one with ``load``."""

    def __init__(self, path: Path, keys: tuple[ApiKey, ...], *, now_s: Callable[[], float] = time.time) -> None:
        """``now_s`` gives seconds since 1970."""
        self._path = path
        self._now_s = now_s
        self._seen: tuple[int, ...] = ()
        self._usages: dict[str, _Usage] = {}
        self._put(keys)

    @classmethod
    def load(cls, path: Path, *, now_s: Callable[[], float] = time.time) -> Self:
        """The keys of the file. Raises KeyFileError for one that cannot be read or understood."""
        # Looked at before it is read: what is written meanwhile is found at the next look.
        seen = _look(path)
        keys = cls(path, read_keys(path), now_s=now_s)
        keys._seen = seen
        return keys

    def __len__(self) -> int:
        return len(self._usages)

    def check(self, authorization: str | None, *, scope: Scope | None) -> str:
        """The id of the key that ``authorization`` (``Bearer sm-...``) carries, counting nothing; without ``scope`` any
        key will do. Raises StatusError: UNAUTHENTICATED without a key that is known and not expired, PERMISSION_DENIED
        for one without the scope."""
        return self._usage(authorization, scope).key.key_id

    def admit(self, authorization: str | None, *, scope: Scope) -> Admission:
        """Count a request until its admission is closed. Raises StatusError as ``check``, and RESOURCE_EXHAUSTED with
        a retry delay beyond the key's limits."""
        usage = self._usage(authorization, scope)
        usage.take(self._now_s())
        return Admission(usage)

    def refresh(self) -> None:
        """Look whether the file has changed, and read it anew if so. A broken file changes nothing, and is told of in
        one line of the log."""
        seen = _look(self._path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            keys = read_keys(self._path)
        except KeyFileError as error:
            log.error("the API keys stay as they were: %s", error)
            return
        self._put(keys)
        log.info("%d API keys from %s", len(keys), self._path)

    async def follow(self, *, interval_s: float = LOOK_INTERVAL_S) -> None:
        """Keep the keys as the file has them, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            seen = await asyncio.to_thread(_look, self._path)
            if seen != self._seen:
                # On the loop, as all use of the keys is: a megabyte at most, and only after a change.
                self.refresh()

    def _put(self, keys: tuple[ApiKey, ...]) -> None:
        """Take ``keys`` as all there are. A key that stays keeps what it has in flight, also with new limits."""
        former = {usage.key.key_id: usage for usage in self._usages.values()}
        now_s = self._now_s()
        self._usages = {}
        for key in keys:
            usage = former.get(key.key_id)
            if usage is None:
                usage = _Usage(key, now_s)
            usage.key = key
            self._usages[key.sha256] = usage

    def _usage(self, authorization: str | None, scope: Scope | None) -> _Usage:
        if not authorization:
            raise StatusError(
                grpc.StatusCode.UNAUTHENTICATED,
                "an API key is needed: send `authorization: Bearer sm-...` with the call",
            )
        scheme, _, secret = authorization.strip().partition(" ")
        secret = secret.strip()
        fits = len(authorization) <= MAX_AUTHORIZATION_CHARS and authorization.isascii()
        if scheme.lower() != "bearer" or not fits or not secret.startswith(KEY_PREFIX):
            raise StatusError(
                grpc.StatusCode.UNAUTHENTICATED,
                "the authorization is not understood: send `Bearer` and an API key, which begins with sm-",
            )
        # How long the look-up takes depends on the digest only. Whoever could steer a digest towards one in the table
        # by measuring that could invert SHA-256.
        usage = self._usages.get(digest_of(secret))
        if usage is None:
            raise StatusError(grpc.StatusCode.UNAUTHENTICATED, "the API key is not known here; use another")
        key = usage.key
        if key.expires is not None and self._now_s() >= key.expires.timestamp():
            raise StatusError(grpc.StatusCode.UNAUTHENTICATED, "the API key has expired; use another")
        if scope is not None and scope not in key.scopes:
            raise StatusError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"the API key may not {scope.value}; use one with the scope {scope.value}",
            )
        return usage


def _look(path: Path) -> tuple[int, ...]:
    """What changes when the file does; empty when it is not there. Also follows a symbolic link that is turned to
    another file, as Kubernetes does with a secret."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino)
