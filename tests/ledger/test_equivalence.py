"""Random operations on both ledgers: the same calls get the same answers.

Each case is a seed. Replay one: ``pytest tests/ledger/test_equivalence.py -k 'seed-7'``. Time passes only in the
operation ``lapse``, which gives something a short life and waits, on both clocks, until it is over.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable

import pytest

from starmesh.clock import VirtualClock
from starmesh.ledger import Ledger, LedgerError, OwnershipConflict, ReservationRefused
from starmesh.ledger.memory import MemoryLedger
from starmesh.ledger.redis import RedisLedger
from starmesh.types import ClusterView, InstanceLoad, InstanceState, InstanceView, Ownership, Role, SequenceLoad

from .conformance import instance
from .conftest import until

OPERATIONS = 120
LONG_S = 3600.0
LAPSE_S = 0.001

Operation = Callable[[Ledger, float], Awaitable[object]]


@dataclasses.dataclass
class Draw:
    """Draws operations over few names, so that they meet."""

    random: random.Random

    def operation(self) -> tuple[str, Operation]:
        make = self.random.choice(
            [self.register, self.set_state, self.deregister, self.release, self.owner, self.renew, self.disown]
            + [self.lead, self.resign]
            + 2 * [self.report]
            + 3 * [self.reserve, self.claim]
        )
        return make.__name__, make()

    def _instance_id(self) -> str:
        return self.random.choice(["d0", "d1"])

    def _incarnation(self) -> str:
        return self.random.choice(["one", "one", "one", "two"])

    def _request_id(self) -> str:
        return f"r{self.random.randrange(5)}"

    def register(self) -> Operation:
        state = self.random.choice([InstanceState.READY, InstanceState.READY, InstanceState.DRAINING])
        info = dataclasses.replace(instance(self._instance_id(), self._incarnation()), state=state)
        if self.random.random() < 0.1:
            info = dataclasses.replace(info, layout=None)
        return lambda ledger, ttl_s: ledger.register(info, ttl_s=ttl_s)

    def report(self) -> Operation:
        ids = (self._instance_id(), self._incarnation())
        included = {self._request_id() for _ in range(self.random.randrange(3))}
        load = InstanceLoad(
            total_blocks=20,
            free_blocks=self.random.randrange(21),
            step_duration_s=self.random.random(),
            sequences=tuple(SequenceLoad(name, 1, 2, 3, 4, 5) for name in sorted(included)),
        )
        return lambda ledger, ttl_s: ledger.report(*ids, load, ttl_s=ttl_s)

    def set_state(self) -> Operation:
        ids = (self._instance_id(), self._incarnation())
        state = self.random.choice([InstanceState.READY, InstanceState.DRAINING])
        return lambda ledger, _: ledger.set_state(*ids, state)

    def deregister(self) -> Operation:
        ids = (self._instance_id(), self._incarnation())
        return lambda ledger, _: ledger.deregister(*ids)

    def reserve(self) -> Operation:
        ids = (self._request_id(), self._instance_id())
        tokens, limit = self.random.randint(1, 150), self.random.choice([100, 320, 1000])
        return lambda ledger, ttl_s: ledger.reserve(*ids, tokens, limit_tokens=limit, ttl_s=ttl_s)

    def release(self) -> Operation:
        ids = (self._request_id(), self._instance_id())
        return lambda ledger, _: ledger.release(*ids)

    def claim(self) -> Operation:
        ids = (self._request_id(), self._instance_id())
        expected = Ownership(self._instance_id(), self.random.randint(1, 2)) if self.random.random() < 0.6 else None
        epoch = self.random.randint(1, 4)
        return lambda ledger, ttl_s: ledger.claim(*ids, expected=expected, epoch=epoch, ttl_s=ttl_s)

    def owner(self) -> Operation:
        request_id = self._request_id()
        return lambda ledger, _: ledger.owner(request_id)

    def renew(self) -> Operation:
        owned = {self._request_id(): self.random.randint(1, 3) for _ in range(2)}
        return lambda ledger, _: ledger.renew(owned, ttl_s=LONG_S)

    def disown(self) -> Operation:
        request_id, epoch = self._request_id(), self.random.randint(1, 3)
        return lambda ledger, _: ledger.disown(request_id, epoch)

    def lead(self) -> Operation:
        ids = (self._instance_id(), self._incarnation())

        async def lead(ledger: Ledger, ttl_s: float) -> bool:
            # Terms are by the store's clock.
            return await ledger.lead(Role.RESCHEDULER, *ids, ttl_s=ttl_s) is not None

        return lead

    def resign(self) -> Operation:
        ids = (self._instance_id(), self._incarnation())
        return lambda ledger, _: ledger.resign(Role.RESCHEDULER, *ids)


async def leader(ledger: Ledger) -> str | None:
    leads = await ledger.leader(Role.RESCHEDULER)
    return leads and leads.instance_id


async def answer(operation: Operation, ledger: Ledger, ttl_s: float) -> object:
    """What the operation returned or raised, as something to compare."""
    try:
        return await operation(ledger, ttl_s)
    except OwnershipConflict as conflict:
        return ("conflict", conflict.current)
    except ReservationRefused as refused:
        return ("refused", refused.instance_id, refused.reason)
    except (LedgerError, ValueError) as error:
        return (type(error), str(error))


def timeless(view: ClusterView) -> list[InstanceView]:
    """The view without its times, which are of two clocks."""
    return [
        dataclasses.replace(
            found,
            reported_at_s=0.0,
            reservations=tuple(dataclasses.replace(item, expires_at_s=0.0) for item in found.reservations),
        )
        for found in view.instances
    ]


@pytest.mark.parametrize("seed", range(10), ids=lambda seed: f"seed-{seed}")
async def test_both_ledgers_answer_alike(redis_ledger: RedisLedger, seed: int) -> None:
    print(f"seed {seed}")
    draw = Draw(random.Random(seed))
    clock = VirtualClock()
    memory = MemoryLedger(clock)
    seen: set[str] = set()
    for step in range(OPERATIONS):
        name, operation = draw.operation()
        where = f"seed {seed}, step {step}, {name}"
        if draw.random.random() < 0.1:
            # Either ledger may be asked for the outcome only when the short life is surely over on both.
            await asyncio.gather(answer(operation, memory, LAPSE_S), answer(operation, redis_ledger, LAPSE_S))
            clock.advance(2 * LAPSE_S)
            lapsed = (await redis_ledger.view()).now_s + 2 * LAPSE_S

            async def over(lapsed: float = lapsed) -> bool:
                return (await redis_ledger.view()).now_s > lapsed

            await until(over)
        else:
            expected = await answer(operation, memory, LONG_S)
            assert await answer(operation, redis_ledger, LONG_S) == expected, where
            seen.add(f"{name}: {expected}" if isinstance(expected, bool) else name)
        assert timeless(await redis_ledger.view()) == timeless(await memory.view()), where
        assert await leader(redis_ledger) == await leader(memory), where
        request_ids = [f"r{request}" for request in range(5)]
        owners = await asyncio.gather(*map(redis_ledger.owner, request_ids))
        assert owners == [await memory.owner(request_id) for request_id in request_ids], where
    assert len(seen) > 8, "the draw should reach most operations"
