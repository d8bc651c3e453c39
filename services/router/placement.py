"""What a request asks of dispatch, what it gets, and what its client hears when it gets nothing. Values only."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import grpc

from starmesh.policy.admission import Need
from starmesh.rpc.status import StatusError, bad_field, retry_later
from starmesh.types import InstanceInfo, RemainingEstimate

_RETRY_DELAY_S = 1.0


class NotPlaced(StatusError):
    """No instance takes the request, and the time to wait for one is over: the request has failed."""

    @classmethod
    def for_its_length(cls, tokens: int) -> NotPlaced:
        """No instance will ever hold it."""
        return cls._of(bad_field("input", f"has {tokens} tokens, more than any instance can hold; send fewer"))

    @classmethod
    def for_the_queue(cls, length: int, delay_s: float) -> NotPlaced:
        """So many wait already that it may not."""
        message = f"{length} requests wait for an instance with room; try again later"
        return cls._of(retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, message, delay_s))

    @classmethod
    def for_want_of_room(cls, delay_s: float) -> NotPlaced:
        """It has waited for room."""
        message = "no instance had room in time; try again later"
        return cls._of(retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, message, delay_s))

    @classmethod
    def for_want_of_instances(cls) -> NotPlaced:
        """It has waited for any instance to be up."""
        message = "no prefill and decode instance that take requests are up; try again later"
        return cls._of(retry_later(grpc.StatusCode.UNAVAILABLE, message, _RETRY_DELAY_S))

    @classmethod
    def _of(cls, error: StatusError) -> NotPlaced:
        return cls(error.code, error.message, *error.details)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request runs first."""

    prefill: InstanceInfo
    decode: InstanceInfo


@dataclass(frozen=True, slots=True)
class Demand:
    """A request that wants a place. Of one that has ``started`` the client has part of the answer: it goes before all
    others and waits until its deadline. Instances in ``avoid`` are chosen only where their role has no others.
    ``estimate`` is what it is predicted to generate still, as of now, and ``held_s`` for how long it has been the first
    of those that wait."""

    request_id: str
    need: Need
    deadline_s: float
    priority: int = 0
    started: bool = False
    avoid: Set[str] = frozenset()
    estimate: RemainingEstimate | None = None
    held_s: float = 0.0
