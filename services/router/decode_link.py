"""The one Decode stream to each decode instance.

Owns the stream, its one writer and its one reader, and which request is to hear of which output. Owns no request's
state: a receiver gets plain calls. A stream that breaks is told to every request on it and is not mended: the next
request opens a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

import grpc.aio

from services.router.flight import InstanceLost
from starmesh.rpc.channels import open_channel
from starmesh.rpc.credentials import Credentials
from starmesh.types import InstanceInfo, Role
from starmesh.v1 import decode_pb2, decode_pb2_grpc, sequence_pb2

log = logging.getLogger(__name__)

# What may wait for a peer that reads slowly. One that lets so many messages gather is as good as dead.
MAX_QUEUED_MESSAGES = 4096


class Receiver(Protocol):
    """Who hears of a request. No call may block or raise."""

    def deliver(self, output: sequence_pb2.SequenceOutput) -> None:
        """Take an output."""
        ...

    def moved(self, move: decode_pb2.SequenceMove) -> bool:
        """The sequence goes on elsewhere, after the outputs so far. Returns whether the receiver will go there."""
        ...

    def lost(self, error: InstanceLost) -> None:
        """The stream broke; the instance has cancelled the sequence, or is dead, or has moved it away."""
        ...


class DecodeLink:
    """A Decode stream to one incarnation of an instance; opened by the constructor."""

    def __init__(
        self,
        instance: InstanceInfo,
        credentials: Credentials | None = None,
        *,
        on_stray: Callable[[decode_pb2.SequenceMove], None],
    ) -> None:
        """``on_stray`` hears of moves that no receiver goes along with."""
        self.instance = instance
        self._credentials = credentials
        self._on_stray = on_stray
        self._receivers: dict[str, Receiver] = {}
        self._outgoing: asyncio.Queue[decode_pb2.DecodeRequest | None] = asyncio.Queue(MAX_QUEUED_MESSAGES)
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self._lost: InstanceLost | None = None
        self._task = asyncio.create_task(self._run(), name=f"decode link {instance.instance_id}")

    def __repr__(self) -> str:
        state = f"lost ({self._lost.reason})" if self._lost else "up"
        return f"<DecodeLink {self.instance.instance_id} {state}, {len(self._receivers)} requests>"

    @property
    def broken(self) -> bool:
        """Whether the stream has ended."""
        return self._lost is not None

    @property
    def requests(self) -> int:
        """How many requests listen."""
        return len(self._receivers)

    @property
    def silent_s(self) -> float:
        """Seconds since the instance last sent anything."""
        return self._loop.time() - self._heard_s

    def start(self, receiver: Receiver, message: decode_pb2.StartSequence) -> None:
        """Start a sequence; its outputs go to ``receiver`` until ``leave``. Raises InstanceLost."""
        self._enter(receiver, message.sequence.request_id, decode_pb2.DecodeRequest(start=message))

    def attach(self, receiver: Receiver, message: decode_pb2.AttachSequence) -> None:
        """Ask for a sequence that has moved here; its outputs go to ``receiver`` until ``leave``. Raises
        InstanceLost."""
        self._enter(receiver, message.request_id, decode_pb2.DecodeRequest(attach=message))

    def leave(self, receiver: Receiver, request_id: str) -> None:
        """Stop listening to a request, unless another receiver has taken its id over."""
        if self._receivers.get(request_id) is receiver:
            del self._receivers[request_id]

    def cancel(self, request_id: str, epoch: int) -> None:
        """Cancel a sequence of this epoch or older on the instance, which frees its blocks at its next step."""
        if self._lost is None:
            cancel = decode_pb2.CancelSequence(request_id=request_id, epoch=epoch)
            self._send(decode_pb2.DecodeRequest(cancel=cancel))

    def lose(self, reason: str) -> None:
        """Give the stream up, and tell every request on it."""
        if self._lost is None:
            self._lost = InstanceLost(self.instance.instance_id, reason)
            if self._receivers:
                log.warning("lost %s with %d requests", self._lost, len(self._receivers))
            receivers, self._receivers = list(self._receivers.values()), {}
            for receiver in receivers:
                receiver.lost(self._lost)
            # gRPC's writer waits for messages, also for a call that has ended. (One with a full queue waits elsewhere,
            # and hears of the end there.)
            with contextlib.suppress(asyncio.QueueFull):
                self._outgoing.put_nowait(None)
            self._task.cancel()

    async def close(self) -> None:
        """End the stream."""
        self.lose("the router is closing the stream")
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def _enter(self, receiver: Receiver, request_id: str, message: decode_pb2.DecodeRequest) -> None:
        if self._lost is None:
            self._send(message)
        if self._lost is not None:
            raise self._lost
        self._receivers[request_id] = receiver

    def _send(self, message: decode_pb2.DecodeRequest) -> None:
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.lose(f"it has not read {MAX_QUEUED_MESSAGES} messages")

    async def _messages(self) -> AsyncIterator[decode_pb2.DecodeRequest]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def _run(self) -> None:
        reason = "it ended the stream"
        try:
            async with open_channel(self.instance.address, self._credentials) as channel:
                # No deadline: the stream lives as long as both processes. Keepalive and ``silent_s`` find a dead peer.
                call = decode_pb2_grpc.DecodeServiceStub(channel).Decode(self._messages())
                while isinstance(response := await call.read(), decode_pb2.DecodeResponse):
                    self._heard_s = self._loop.time()
                    receivers = self._receivers
                    for output in response.outputs:
                        receiver = receivers.get(output.request_id)
                        if receiver is not None:
                            receiver.deliver(output)
                    # After the outputs: the last tokens of a sequence that moves are in the same message or before.
                    for move in response.moves:
                        receiver = receivers.get(move.request_id)
                        if receiver is None or not receiver.moved(move):
                            self._on_stray(move)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except Exception as error:
            log.exception("reading from %s failed", self.instance.instance_id)
            reason = f"reading its stream failed: {type(error).__name__}"
        finally:
            self.lose(reason)


class DecodeLinks:
    """The links by instance, opened on first use."""

    def __init__(self, find: Callable[[str], InstanceInfo | None], credentials: Credentials | None) -> None:
        """``find`` tells what the ledger knows of an instance."""
        self._find = find
        self._credentials = credentials
        self._links: dict[str, DecodeLink] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def get(self, instance: InstanceInfo) -> DecodeLink:
        """The link to this incarnation of an instance: a new one where the last broke or the process is another."""
        link = self._links.get(instance.instance_id)
        if link is None or link.broken or not _same_process(link.instance, instance):
            if link is not None:
                self._close(link)
            link = DecodeLink(instance, self._credentials, on_stray=self._refuse)
            self._links[instance.instance_id] = link
        elif not link.instance.incarnation:
            link.instance = instance
        return link

    def locate(self, instance_id: str, address: str) -> InstanceInfo:
        """The instance that a move names.

        It has just been spoken to at ``address``. The last look at the ledger may be older and know another process of
        its name, or none; its incarnation is left open then.
        """
        info = self._find(instance_id)
        if info is None or info.address != address:
            info = InstanceInfo(instance_id, incarnation="", role=Role.DECODE, address=address)
        return info

    def prune(self, missing: set[str], *, silent_s: float) -> None:
        """Give up links whose instance is in ``missing`` and has sent nothing for ``silent_s``, and forget those that
        broke: their instances may never come back."""
        for instance_id, link in list(self._links.items()):
            if instance_id in missing and link.silent_s >= silent_s:
                link.lose("its lease in the ledger ended and its stream is silent")
            if link.broken:
                self._close(self._links.pop(instance_id))

    async def close(self) -> None:
        """End all links."""
        # A message that is read meanwhile may open another, to pass a stray move on.
        while self._links or self._closing:
            for link in self._links.values():
                self._close(link)
            self._links.clear()
            await asyncio.gather(*self._closing)

    def _close(self, link: DecodeLink) -> None:
        task = asyncio.create_task(link.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _refuse(self, move: decode_pb2.SequenceMove) -> None:
        """Nobody here goes along with a sequence: its new owner need not wait for us to come."""
        self.get(self.locate(move.instance_id, move.address)).cancel(move.request_id, move.epoch)


def _same_process(linked: InstanceInfo, wanted: InstanceInfo) -> bool:
    """Whether a link serves for an instance. Where a move left the incarnation open, the address decides."""
    if linked.incarnation and wanted.incarnation:
        return linked.incarnation == wanted.incarnation
    return linked.address == wanted.address
