"""Listens to one request's sequence where it decodes, and goes along when it moves.

Owns the request's place on the decode links: it starts the sequence at one instance, attaches wherever a migration has
taken it, and tells whoever still has it when the request ends from this side. Owns no choice of instance and nothing
that comes after the sequence has been lost or given up (``life``). docs/migration.md, "What the router does".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry import trace

from services.router.flight import Broken, Ended, Flight, InstanceLost, Lost, Moved, Outcome
from services.router.parts import Parts
from starmesh.policy.admission import Need
from starmesh.rpc import convert
from starmesh.telemetry import names
from starmesh.types import InstanceInfo, InstanceState, Ownership
from starmesh.v1 import decode_pb2


@dataclass(frozen=True, slots=True)
class Stay:
    """Where a sequence decoded last, and what became of it there. ``moved`` says whether it was to have come there, or
    anywhere, by migration: its prefill's ticket is spent then."""

    instance: InstanceInfo
    outcome: Outcome
    moved: bool


class Follower:
    """One request's."""

    def __init__(self, parts: Parts, flight: Flight, *, timeout_s: Callable[[], float]) -> None:
        """``timeout_s`` says how long an instance may work on the sequence from now on."""
        self._parts = parts
        self._flight = flight
        self._timeout_s = timeout_s

    async def decode(self, instance: InstanceInfo, start: decode_pb2.StartSequence) -> Stay:
        """Start the sequence at ``instance`` and listen to it there and wherever it moves, until it ends or an
        instance does not go on with it."""
        flight, parts = self._flight, self._parts
        moved = False
        outcome = await self._listen(instance, start.sequence.epoch, start)
        while True:
            if isinstance(outcome, Moved):
                owner = outcome.owner
                target = parts.links.locate(owner.instance_id, outcome.address)
            elif isinstance(outcome, Lost) and (found := await self._moved_unheard()) is not None:
                owner, target = found
                parts.dispatcher.suspect(instance.instance_id)
            else:
                return Stay(instance, outcome, moved)
            if flight.ended:
                parts.links.get(target).cancel(flight.request_id, owner.epoch)
                return Stay(target, Ended(by_instance=True), True)
            self._note(instance, owner)
            instance, moved = target, True
            attach = decode_pb2.AttachSequence(
                request_id=flight.request_id,
                epoch=owner.epoch,
                offset=len(flight.stream.token_ids),
                timeout=convert.duration_pb(self._timeout_s()),
            )
            outcome = await self._listen(target, owner.epoch, attach)

    async def _listen(
        self, instance: InstanceInfo, epoch: int, message: decode_pb2.StartSequence | decode_pb2.AttachSequence
    ) -> Outcome | Moved:
        """Send ``message`` to the instance that is to go on with the sequence under ``epoch``, and wait for what
        becomes of it there."""
        flight, parts = self._flight, self._parts
        request_id = flight.request_id

        def taken_back(newer: int) -> None:
            parts.owners.follow(request_id, Ownership(instance.instance_id, newer))

        settled = flight.begin(epoch, on_newer_epoch=taken_back)
        link = parts.links.get(instance)
        outcome: Outcome | Moved
        try:
            if isinstance(message, decode_pb2.StartSequence):
                link.start(flight, message)
            else:
                link.attach(flight, message)
            outcome = await settled
        except InstanceLost as error:
            outcome = Lost(error)
        except asyncio.CancelledError:
            # Cut short from this side: whoever has the sequence still works on it, also if it has moved just now.
            if settled.done() and not settled.cancelled() and isinstance(last := settled.result(), Moved):
                target = parts.links.locate(last.owner.instance_id, last.address)
                parts.links.get(target).cancel(request_id, last.owner.epoch)
            else:
                link.cancel(request_id, flight.stream.epoch)
            raise
        finally:
            link.leave(flight, request_id)
        if outcome == Ended(by_instance=False) or isinstance(outcome, Broken):
            link.cancel(request_id, flight.stream.epoch)
        return outcome

    async def _moved_unheard(self) -> tuple[Ownership, InstanceInfo] | None:
        """Where the sequence is, if it had moved when the link to its instance broke and the word of it did not come;
        None when it went with the instance, or when nobody knows."""
        parts = self._parts
        owner = await parts.owners.find_move(self._flight.request_id)
        target = parts.watch.find(owner.instance_id) if owner is not None else None
        return None if owner is None or target is None else (owner, target)

    def _note(self, source: InstanceInfo, owner: Ownership) -> None:
        """Whatever is kept of the request by instance goes along."""
        flight, parts = self._flight, self._parts
        flight.migrations += 1
        known = parts.watch.find(source.instance_id)
        draining = known is not None and known.state is not InstanceState.READY
        parts.moves.note(
            flight, source=source.instance_id, target=owner.instance_id, epoch=owner.epoch, draining=draining
        )
        parts.owners.follow(flight.request_id, owner)
        stream = flight.stream
        output_tokens = len(stream.token_ids)
        need = Need(flight.prompt_tokens + output_tokens, max(0, stream.max_output_tokens - output_tokens))
        parts.dispatcher.moved(flight.request_id, owner.instance_id, need)
        trace.get_current_span().add_event(
            names.EVENT_MOVED,
            {
                names.SOURCE_INSTANCE: source.instance_id,
                names.TARGET_INSTANCE: owner.instance_id,
                names.EPOCH: owner.epoch,
                names.OUTPUT_TOKENS: output_tokens,
            },
        )
