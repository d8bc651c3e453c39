"""Commands migrations to their sources and follows each to its end.

Owns the calls and their bounds. Owns neither the decision nor what is remembered of the outcome (``loop``). Ending a
call does not end the migration, which is the source's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import grpc
import grpc.aio
from opentelemetry.trace import Span, SpanKind

from services.rescheduler.ending import Ending, Outcome, is_end, of_progress, of_status
from starmesh.rpc.channels import ChannelPool
from starmesh.rpc.convert_migration import reason_pb
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.status import from_rpc_error
from starmesh.telemetry import names
from starmesh.telemetry.setup import address_attributes, context_of, link_to, span, traceparent_of
from starmesh.types import ClusterView, Migration, Role
from starmesh.v1 import decode_pb2, decode_pb2_grpc

log = logging.getLogger(__name__)

_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Order:
    """A migration with the addresses of its ends, by the leader of ``term``; ``traceparent`` is the round's."""

    migration: Migration
    source_address: str
    target_address: str
    term: int
    traceparent: str

    def request(self, traceparent: str) -> decode_pb2.MigrateRequest:
        """What the source is told; ``traceparent`` is the command's."""
        return decode_pb2.MigrateRequest(
            request_id=self.migration.request_id,
            epoch=self.migration.epoch,
            target_instance_id=self.migration.target,
            target_address=self.target_address,
            reason=reason_pb(self.migration.reason),
            traceparent=traceparent,
            leader_term=self.term,
        )


class Commander:
    """Migrations under way on our command: one task and one call each, as many as are issued and not yet dropped."""

    def __init__(self, *, timeout_s: float, credentials: Credentials | None = None, retry_delay_s: float = 0.5) -> None:
        """``timeout_s`` bounds a migration from its command to its end; a broken call is tried again after
        ``retry_delay_s``."""
        self._timeout_s = timeout_s
        self._retry_delay_s = retry_delay_s
        self._channels = ChannelPool(credentials)
        self._following: dict[Migration, tuple[Order, asyncio.Task[None]]] = {}
        self._endings: list[Ending] = []
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<commander of {len(self._following)} migrations, {len(self._endings)} endings to tell>"

    def __len__(self) -> int:
        """How many are followed."""
        return len(self._following)

    def issue(self, order: Order) -> None:
        """Command a migration and follow it in the background."""
        migration = order.migration
        task = asyncio.create_task(self._follow(order), name=f"migration of {migration.request_id}")
        self._following[migration] = (order, task)
        task.add_done_callback(lambda _: self._following.pop(migration, None))

    def take_endings(self) -> list[Ending]:
        """The migrations that have ended since the last call, in that order."""
        endings, self._endings = self._endings, []
        return endings

    async def retain(self, migrations: Iterable[Migration], view: ClusterView) -> None:
        """Follow only these: the end of the others is known. Those whose source has left ``view`` end as gone."""
        addresses = {instance.info.instance_id: instance.info.address for instance in view.of_role(Role.DECODE)}
        kept = set(migrations)
        lost = [
            migration
            for migration, (order, _) in self._following.items()
            if migration in kept and addresses.get(migration.source) != order.source_address
        ]
        await self._drop([*lost, *(self._following.keys() - kept)])
        for migration in lost:
            # If it was committed, its target reports the sequence; if not, its router begins it anew.
            self._tell(Ending(migration, Outcome.GONE, "its source has left the cluster", 0.0))
        await self._channels.retain(set(addresses.values()))

    async def abandon(self) -> None:
        """Follow nothing any more and forget what has ended: another leads."""
        await self._drop(list(self._following))
        self._endings.clear()

    async def close(self) -> None:
        """End all calls and close the channels."""
        await self.abandon()
        await self._channels.close()

    async def _drop(self, migrations: list[Migration]) -> None:
        tasks = [self._following.pop(migration)[1] for migration in migrations]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _follow(self, order: Order) -> None:
        migration, began_s = order.migration, self._loop.time()
        try:
            async with asyncio.timeout(self._timeout_s):
                outcome, what = await self._command(order)
        except TimeoutError:
            outcome, what = Outcome.FAILED, f"its source told no end within {self._timeout_s:g} s"
        except Exception:
            log.exception("following the migration of %s failed", migration.request_id)
            outcome, what = Outcome.FAILED, "a bug"
        self._tell(Ending(migration, outcome, what, self._loop.time() - began_s))

    def _tell(self, ending: Ending) -> None:
        self._endings.append(ending)
        log.log(
            logging.WARNING if ending.outcome is Outcome.FAILED else logging.INFO,
            "%s, from %s to %s, after %.3f s: %s",
            *(ending.migration.request_id, ending.migration.source, ending.migration.target),
            *(ending.duration_s, ending.what),
        )

    async def _command(self, order: Order) -> tuple[Outcome, str]:
        """Command it, in a span below the round's."""
        migration = order.migration
        attributes = {
            names.REQUEST_ID: migration.request_id,
            names.EPOCH: migration.epoch,
            names.SOURCE_INSTANCE: migration.source,
            names.TARGET_INSTANCE: migration.target,
            names.MIGRATION_REASON: migration.reason.value,
            **address_attributes(order.source_address),
        }
        with span(
            names.SPAN_COMMAND, context_of(order.traceparent), kind=SpanKind.CLIENT, attributes=attributes
        ) as current:
            outcome, what = await self._outcome(order, current)
            current.set_attribute(names.MIGRATION_OUTCOME, outcome.value)
        return outcome, what

    async def _outcome(self, order: Order, current: Span) -> tuple[Outcome, str]:
        """Ask until the source has told the end. What a broken call was about may be under way: asking again follows
        it."""
        request = order.request(traceparent_of(current))
        begun = False
        attempt = 1
        while True:
            stub = decode_pb2_grpc.DecodeServiceStub(self._channels.get(order.source_address))
            call = stub.Migrate(request, timeout=self._timeout_s)
            try:
                async for progress in call:
                    if not begun:
                        link_to(current, progress.traceparent)
                    begun = True
                    if is_end(progress):
                        return of_progress(progress)
                what = "its source ended the call without telling the end"
            except grpc.aio.AioRpcError as error:
                status = from_rpc_error(error)
                known = of_status(status, begun=begun)
                if known is not None:
                    return known
                what = f"{status.code.name}: {status.message}"
            finally:
                call.cancel()
            if attempt == _ATTEMPTS:
                return Outcome.FAILED, what
            attempt += 1
            await asyncio.sleep(self._retry_delay_s)
