"""Runs prompts on the engine and leases their KV blocks.

Owns the requests in progress; knows nothing of gRPC. A sequence lives here until its lease ends: released by the
decode instance that pulled it, or expired.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from services.prefill.metrics import PrefillMetrics
from starmesh.engine.engine import EngineCore, SequenceOutput
from starmesh.engine.scheduler import DuplicateRequest, SchedulingError
from starmesh.instance.hidden_state import pack_hidden_state
from starmesh.instance.instance import Instance
from starmesh.types import FinishReason, HiddenLayout, InstanceState, KvTicket, SequenceSpec


class Draining(Exception):
    """The instance takes nothing new."""


class WrongModel(Exception):
    """The request's tokens are meant for other weights."""


class PrefillFailed(Exception):
    """The engine gave the sequence up."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The first new token, and the blocks; ``ticket`` is None when the sequence ended with that token. ``hidden_state``
    is that of the last token prefilled, packed, and laid out as ``hidden_layout``; empty, and None, when it ended, has
    no use for one, or none are kept here."""

    token_id: int
    finish_reason: FinishReason | None
    ticket: KvTicket | None
    cached_tokens: int
    queue_duration_s: float
    hidden_state: bytes = b""
    hidden_layout: HiddenLayout | None = None


class PrefillWorker:
    """Prefills sequences, many at a time."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._metrics = PrefillMetrics(instance.metrics, lambda: instance.leases if instance.running else None)
        self._waiting: dict[tuple[str, int], asyncio.Future[SequenceOutput]] = {}

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        """Take what a step made."""
        for output in outputs:
            waiting = self._waiting.get((output.request_id, output.epoch))
            if waiting is not None and not waiting.done():
                waiting.set_result(output)

    async def prefill(self, spec: SequenceSpec, model_revision: str) -> Prefilled:
        """Run ``spec``'s tokens, sample the next one and lease the blocks. Cancelling it frees everything.

        Raises Draining, WrongModel, PrefillFailed, LeaseTableFull, and what ``EngineCore.add`` raises.
        """
        began_s = time.monotonic()
        try:
            done = await self._prefill(spec, model_revision)
        except BaseException as error:
            self._metrics.failed(time.monotonic() - began_s, error)
            raise
        self._metrics.prefilled(
            time.monotonic() - began_s,
            wait_s=done.queue_duration_s,
            tokens=spec.tokens,
            cached_tokens=done.cached_tokens,
        )
        return done

    async def _prefill(self, spec: SequenceSpec, model_revision: str) -> Prefilled:
        instance = self._instance
        if instance.state is not InstanceState.READY:
            raise Draining
        ours = instance.layout.model_revision
        if model_revision and model_revision != ours:
            raise WrongModel(f"this instance serves model revision {ours}, not {model_revision}")
        key = (spec.request_id, spec.epoch)
        if key in self._waiting:
            raise DuplicateRequest(f"{spec.request_id} is in progress here")
        # A recovered request may come back before its former epoch has ended here: that one's lease, whoever waits for
        # it and (``_add``) its blocks go, whether or not there is room for the new one.
        instance.revoke_lease(spec.request_id, spec.epoch - 1)
        self._give_up(_superseded(spec), spec.request_id, spec.epoch - 1)
        done: asyncio.Future[SequenceOutput] = asyncio.get_running_loop().create_future()
        self._waiting[key] = done
        try:
            await instance.engine.call(lambda core: _add(core, spec))
            output = await done
            if output.error is not None:
                raise PrefillFailed(output.error)
            return self._prefilled(spec, output)
        except SchedulingError:
            raise  # nothing was taken in; what is here under this id is not ours to drop
        except BaseException:
            # Shielded: a cancelled call must not leave its blocks behind.
            await asyncio.shield(self._drop(spec))
            raise
        finally:
            del self._waiting[key]

    async def close(self) -> None:
        """Give up what is in progress: the router prefills it elsewhere."""
        self._give_up(PrefillFailed("the instance is stopping"))

    def _prefilled(self, spec: SequenceSpec, output: SequenceOutput) -> Prefilled:
        ticket, hidden_state = None, b""
        if output.finish_reason is None:
            if output.hidden_state is not None:
                hidden_state = pack_hidden_state(output.hidden_state)
            # A newer epoch that came meanwhile frees these blocks, or has; it cannot be over yet. Nothing is awaited
            # between the output and the lease.
            if any(waiting_id == spec.request_id and epoch > spec.epoch for waiting_id, epoch in self._waiting):
                raise _superseded(spec)
            ticket = self._instance.lease(spec, output.held_block_ids, output.resident_tokens)
        return Prefilled(
            token_id=output.token_ids[0],
            finish_reason=output.finish_reason,
            ticket=ticket,
            cached_tokens=output.cached_tokens,
            queue_duration_s=output.queue_duration_s,
            hidden_state=hidden_state,
            hidden_layout=self._instance.hidden_layout if hidden_state else None,
        )

    async def _drop(self, spec: SequenceSpec) -> None:
        self._instance.revoke_lease(spec.request_id, spec.epoch)
        await self._instance.engine.call(lambda core: core.cancel(spec.request_id, spec.epoch))

    def _give_up(self, error: PrefillFailed, request_id: str | None = None, epoch: int = 0) -> None:
        """Fail who waits: all, or those of ``request_id`` up to ``epoch``."""
        for (waiting_id, waiting_epoch), waiting in self._waiting.items():
            concerned = request_id is None or (waiting_id == request_id and waiting_epoch <= epoch)
            if concerned and not waiting.done():
                waiting.set_exception(error)


def _add(core: EngineCore, spec: SequenceSpec) -> None:
    core.cancel(spec.request_id, spec.epoch - 1)
    core.add(spec, hold=True)


def _superseded(spec: SequenceSpec) -> PrefillFailed:
    return PrefillFailed(f"a newer epoch of {spec.request_id} is here")
