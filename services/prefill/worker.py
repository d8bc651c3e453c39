"""Runs prompts on the engine and leases their KV blocks.

Owns the requests in progress; knows nothing of gRPC. A sequence lives here until its lease ends: released by the
decode instance that pulled it, or expired.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starmesh.engine.engine import SequenceOutput
from starmesh.engine.scheduler import DuplicateRequest
from starmesh.instance.instance import Instance
from starmesh.types import FinishReason, InstanceState, KvTicket, SequenceSpec


class Draining(Exception):
    """The instance takes nothing new."""


class WrongModel(Exception):
    """The request's tokens are meant for other weights."""


class PrefillFailed(Exception):
    """The engine gave the sequence up."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The first new token, and the blocks; ``ticket`` is None when the sequence ended with that token."""

    token_id: int
    finish_reason: FinishReason | None
    ticket: KvTicket | None
    cached_tokens: int
    queue_duration_s: float


class PrefillWorker:
    """Prefills sequences, many at a time."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._waiting: dict[str, asyncio.Future[SequenceOutput]] = {}

    def deliver(self, outputs: list[SequenceOutput]) -> None:
        """Take what a step made."""
        for output in outputs:
            waiting = self._waiting.get(output.request_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(output)

    async def prefill(self, spec: SequenceSpec, model_revision: str) -> Prefilled:
        """Run ``spec``'s tokens, sample the next one and lease the blocks. Cancelling it frees everything.

        Raises Draining, WrongModel, PrefillFailed, and what ``EngineCore.add`` raises.
        """
        instance = self._instance
        if instance.state is not InstanceState.READY:
            raise Draining
        ours = instance.layout.model_revision
        if model_revision and model_revision != ours:
            raise WrongModel(f"this instance serves model revision {ours}, not {model_revision}")
        if spec.request_id in self._waiting:
            raise DuplicateRequest(spec.request_id)
        # A recovered request may come back before the lease of its former epoch has ended.
        instance.revoke_leases(spec.request_id)
        done: asyncio.Future[SequenceOutput] = asyncio.get_running_loop().create_future()
        self._waiting[spec.request_id] = done
        try:
            await instance.engine.call(lambda core: core.add(spec, hold=True))
            output = await done
            if output.error is not None:
                raise PrefillFailed(output.error)
            return await self._prefilled(spec, output)
        except BaseException:
            # Shielded: a cancelled call must not leave its blocks behind.
            await asyncio.shield(self._drop(spec.request_id))
            raise
        finally:
            del self._waiting[spec.request_id]

    async def _prefilled(self, spec: SequenceSpec, output: SequenceOutput) -> Prefilled:
        instance = self._instance
        ticket = None
        if output.finish_reason is None:
            block_ids, resident_tokens = await instance.engine.call(lambda core: core.held(spec.request_id))
            ticket = instance.lease(spec.request_id, block_ids, resident_tokens)
        return Prefilled(
            token_id=output.token_ids[0],
            finish_reason=output.finish_reason,
            ticket=ticket,
            cached_tokens=output.cached_tokens,
            queue_duration_s=output.queue_duration_s,
        )

    async def _drop(self, request_id: str) -> None:
        self._instance.revoke_leases(request_id)
        await self._instance.engine.call(lambda core: core.cancel(request_id))

    async def close(self) -> None:
        """Give up what is in progress: the router prefills it elsewhere."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(PrefillFailed("the instance is stopping"))
