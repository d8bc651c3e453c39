"""Instances that follow a script: real servers on real sockets, with a formula for a model. Decode instances are in
``decode_peer``.

The next token is a function of all tokens before it, as with a real model and greedy sampling, so a sequence that is
continued elsewhere from the right tokens goes on with the right tokens, and from wrong ones with wrong ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

from starmesh.ledger import Ledger
from starmesh.ledger.membership import Membership
from starmesh.rpc import convert
from starmesh.rpc.server import RpcServer
from starmesh.rpc.status import StatusError
from starmesh.types import (
    FinishReason,
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    KvLayout,
    KvTicket,
    Role,
    SequenceLoad,
    SequenceSpec,
)
from starmesh.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    predictor_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    transfer_pb2,
    transfer_pb2_grpc,
)

LAYOUT = KvLayout(model_revision="rev", dtype="float32", layers=1, kv_heads=1, head_dim=4, block_tokens=16)
HIDDEN_LAYOUT = predictor_pb2.HiddenLayout(model_revision="rev", layers=[1], width=1)
EOS = 2
VOCABULARY = 128
CONTEXT = 512
TTL_S = 3.0
"""How long an event loop that is starved may keep the peers from reporting; also the router's, in ``conftest``."""


def next_token(tokens: Sequence[int]) -> int:
    """The one token that follows: a letter of the vocabulary, never EOS."""
    value = len(tokens)
    for token in tokens:
        value = (value * 31 + token + 7) % 1_000_003
    return 97 + value % 26


def expected_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """The first ``count`` output tokens after ``prompt``."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def finish_of(spec: SequenceSpec, tokens: Sequence[int]) -> FinishReason | None:
    """Why a sequence ends with these output tokens."""
    return FinishReason.LENGTH if len(tokens) >= spec.sampling.max_output_tokens else None


class Peer:
    """One instance: server, membership and a script of failures for its next requests."""

    def __init__(self, ledger: Ledger, role: Role, instance_id: str, *, layout: KvLayout = LAYOUT) -> None:
        self.ledger = ledger
        self.instance_id = instance_id
        self.script: deque[StatusError] = deque()
        """Each of the next requests fails with one of these."""
        self.sequences: dict[str, SequenceLoad] = {}
        self.free_blocks = 1024
        self.specs: list[SequenceSpec] = []
        """What was asked for, refused requests included."""
        self.info = InstanceInfo(
            instance_id=instance_id,
            incarnation=secrets.token_hex(4),
            role=role,
            address="",
            layout=layout,
            max_sequence_tokens=CONTEXT,
            max_sequences=256,
        )
        self.server = RpcServer(listen="127.0.0.1:0")
        self.membership: Membership | None = None
        self._register_service()
        service = cluster_pb2.DESCRIPTOR.services_by_name["InstanceService"].full_name
        self.server.add(cluster_pb2_grpc.add_InstanceServiceServicer_to_server, _Drainable(self), service)

    def _register_service(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        self.info = dataclasses.replace(self.info, address=await self.server.start())
        self.membership = Membership(self.ledger, self.info, load=self._load, ttl_s=TTL_S, interval_s=0.05)
        await self.membership.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        """Die without a word: streams break, reports cease, the lease is left to expire."""
        await self.vanish()
        await self.server.stop(0)

    async def vanish(self) -> None:
        """Hang: the server stays, the reports cease."""
        if self.membership is not None and self.membership._task is not None:
            self.membership._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self.membership._task
            self.membership._task = None

    async def drain(self) -> None:
        assert self.membership is not None
        await self.membership.set_state(InstanceState.DRAINING)

    async def _load(self) -> InstanceLoad:
        return InstanceLoad(
            total_blocks=1024,
            free_blocks=self.free_blocks,
            running_sequences=len(self.sequences),
            sequences=tuple(self.sequences.values()),
        )


class _Drainable(cluster_pb2_grpc.InstanceServiceServicer):
    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def DrainInstance(self, request: Any, context: Any) -> cluster_pb2.DrainInstanceResponse:  # noqa: N802
        await self._peer.drain()
        return cluster_pb2.DrainInstanceResponse(
            state=cluster_pb2.INSTANCE_STATE_DRAINING, remaining_sequences=len(self._peer.sequences)
        )

    async def GetInstance(self, request: Any, context: Any) -> cluster_pb2.GetInstanceResponse:  # noqa: N802
        return cluster_pb2.GetInstanceResponse()


class _Leases(transfer_pb2_grpc.TransferServiceServicer):
    """What the router uses of transfer: the end of a lease."""

    def __init__(self, peer: PrefillPeer) -> None:
        self._peer = peer

    async def ReleaseLease(self, request: Any, context: Any) -> transfer_pb2.ReleaseLeaseResponse:  # noqa: N802
        self._peer.released.append(request.lease_id)
        return transfer_pb2.ReleaseLeaseResponse()

    async def Negotiate(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    def PullBlocks(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def RenewLease(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError


class PrefillPeer(Peer, prefill_pb2_grpc.PrefillServiceServicer):
    """A prefill instance."""

    def __init__(self, ledger: Ledger, instance_id: str = "prefill-0", **options: Any) -> None:
        super().__init__(ledger, Role.PREFILL, instance_id, **options)
        self.gate = asyncio.Event()
        """While clear, prefills hang."""
        self.gate.set()
        self.cancelled: list[str] = []
        self.lease_s = 30.0
        self.hidden_state = b""
        """What is sent of the last token's."""
        self.released: list[str] = []
        service = transfer_pb2.DESCRIPTOR.services_by_name["TransferService"].full_name
        self.server.add(transfer_pb2_grpc.add_TransferServiceServicer_to_server, _Leases(self), service)

    def _register_service(self) -> None:
        service = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name
        self.server.add(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, self, service)

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Any
    ) -> prefill_pb2.PrefillResponse:
        spec = convert.spec(request.sequence)
        self.specs.append(spec)
        if self.script:
            raise self.script.popleft()
        assert request.model_revision == LAYOUT.model_revision
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(spec.request_id)
            raise
        tokens = [*spec.prompt_token_ids, *spec.output_token_ids]
        token_id = next_token(tokens)
        finish = finish_of(spec, [*spec.output_token_ids, token_id])
        ticket = KvTicket(
            lease_id=f"{spec.request_id}/{spec.epoch}",
            instance_id=self.instance_id,
            address=self.info.address,
            layout=LAYOUT,
            block_ids=(0,),
            resident_tokens=len(tokens),
            lease_duration_s=self.lease_s,
        )
        return prefill_pb2.PrefillResponse(
            token_id=token_id,
            finish_reason=convert.finish_reason_pb(finish),
            ticket=convert.ticket_pb(ticket) if finish is None else None,
            hidden_state=self.hidden_state if finish is None else b"",
            hidden_layout=HIDDEN_LAYOUT if finish is None and self.hidden_state else None,
            cached_tokens=3,
        )
