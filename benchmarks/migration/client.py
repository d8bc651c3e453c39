"""The client of ``benchmarks.migration``: what a router does for its requests, with a time stamp on every token.

Owns the streams that it starts, moves and recomputes. It speaks over the router's own Decode links, so a token is
stamped where the router has it in hand; a move is asked for at the source, as a rescheduler would.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
import statistics
import time
from dataclasses import dataclass, field

from benchmarks.migration.moves import Move, Told, check_moved, copying
from benchmarks.migration.processes import RING, Member, Processes
from services.router.decode_link import DecodeLink
from services.router.flight import InstanceLost
from starmesh.ledger.redis import RedisLedger
from starmesh.migration.terms import EPOCHS_PER_MIGRATION
from starmesh.rpc import convert
from starmesh.rpc.channels import ChannelPool
from starmesh.types import InstanceInfo, Ownership, Role, SamplingParams, SequenceSpec
from starmesh.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, sequence_pb2

CONTEXT_TOKENS = 8192
VOCABULARY = range(300, 40_000)  # ordinary words of the default model
TTL_S = 600.0
PREFILL_TIMEOUT_S = 300.0
TOKEN_TIMEOUT_S = 120.0
MOVE_TIMEOUT_S = 60.0


@dataclass(slots=True, eq=False)
class Stream:
    """One request. ``arrivals`` has a time for each output token, ``begins`` the first token of each epoch, and
    ``waited_s`` says how long the last prefill let the client wait for a token."""

    spec: SequenceSpec
    member: Member
    links: dict[str, DecodeLink]
    token_ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    begins: dict[int, int] = field(default_factory=dict)
    waited_s: float = 0.0
    error: str = ""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tokens(self) -> int:
        """Prompt and output tokens."""
        return len(self.spec.prompt_token_ids) + len(self.token_ids)

    @property
    def link(self) -> DecodeLink:
        """The Decode stream to its instance."""
        return self.links[self.member.name]

    def go_on(self, member: Member, epoch: int) -> None:
        """Note a new owner."""
        self.member = member
        self.spec = dataclasses.replace(self.spec, epoch=epoch)

    def add(self, token_ids: list[int], epoch: int) -> None:
        """Note tokens that have just come."""
        self.begins.setdefault(epoch, len(self.token_ids))
        self.token_ids += token_ids
        self.arrivals += [time.perf_counter()] * len(token_ids)
        self.news.set()

    def deliver(self, output: sequence_pb2.SequenceOutput) -> None:
        """Take an output: every token once and in order, or the benchmark is void."""
        if output.HasField("failure") or output.finish_reason:
            self._fail(f"it ended: {output}")
        elif output.offset != len(self.token_ids):
            self._fail(f"offset {output.offset} after {len(self.token_ids)} tokens")
        else:
            self.add(list(output.token_ids), output.epoch)

    def moved(self, move: decode_pb2.SequenceMove) -> bool:
        """Go along, as the router does."""
        self.link.leave(self, move.request_id)
        self.go_on(next(member for member in RING if member.name == move.instance_id), move.epoch)
        timeout = convert.duration_pb(TTL_S)
        attach = decode_pb2.AttachSequence(
            request_id=move.request_id, epoch=move.epoch, offset=len(self.token_ids), timeout=timeout
        )
        self.link.attach(self, attach)
        return True

    def lost(self, error: InstanceLost) -> None:
        """Note that there is nothing more to come."""
        self._fail(str(error))

    async def until(self, count: int) -> None:
        """Wait until there are ``count`` output tokens."""
        async with asyncio.timeout(TOKEN_TIMEOUT_S):
            while len(self.token_ids) < count:
                if self.error:
                    raise RuntimeError(f"{self.spec.request_id}: {self.error}")
                self.news.clear()
                await self.news.wait()

    def spaces(self, start: int, end: int) -> list[float]:
        """The seconds between each two of the output tokens ``start`` to ``end - 1``."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals[start:end])]

    def _fail(self, error: str) -> None:
        self.error = self.error or error
        self.news.set()


class Client:
    """Starts, moves, recomputes and cancels streams."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._channels = ChannelPool()
        self._ledger = RedisLedger.connect(processes.ledger_url)
        self._rng = random.Random(0)
        self._numbers = itertools.count()
        self.links = {
            member.name: DecodeLink(
                InstanceInfo(member.name, "", Role.DECODE, processes.address(member.name)), on_stray=_no_stray
            )
            for member in RING
        }

    async def start(self, member: Member, tokens: int) -> Stream:
        """A stream of ``tokens`` random prompt tokens that decodes at ``member``."""
        sampling = SamplingParams(max_output_tokens=CONTEXT_TOKENS, temperature=0.0, ignore_eos=True)
        prompt = tuple(self._rng.choices(VOCABULARY, k=tokens))
        spec = SequenceSpec(f"stream-{next(self._numbers)}", 1, prompt, (), sampling)
        stream = Stream(spec, member, self.links)
        started_s = time.perf_counter()
        await self._ledger.claim(spec.request_id, member.name, expected=None, epoch=1, ttl_s=TTL_S)
        await self._prefill(stream, started_s)
        return stream

    async def recompute(self, stream: Stream, member: Member) -> None:
        """Leave a stream's instance and prefill it anew, to go on at ``member``: what a router does after a death. The
        client waits from its last token to the next one, which is the prefill's."""
        await stream.until(len(stream.token_ids) + 1)
        self.cancel(stream)
        before = Ownership(stream.member.name, stream.spec.epoch)
        epoch = before.epoch + EPOCHS_PER_MIGRATION + 1
        await self._ledger.claim(stream.spec.request_id, member.name, expected=before, epoch=epoch, ttl_s=TTL_S)
        stream.go_on(member, epoch)
        await self._prefill(stream, stream.arrivals[-1])

    async def move(self, stream: Stream, target: Member, *, settle_tokens: int) -> Move:
        """Migrate a stream; ``settle_tokens`` before and after give its ordinary time between tokens. Raises
        MoveFailed."""
        start = len(stream.token_ids)
        await stream.until(start + settle_tokens)
        epoch = stream.spec.epoch + 1
        told = await self._migrate(stream, target)
        check_moved(told, f"from {stream.member.name} to {target.name}")
        while epoch not in stream.begins:
            await stream.until(len(stream.token_ids) + 1)
        await self._ledger.renew({stream.spec.request_id: stream.spec.epoch}, ttl_s=TTL_S)
        at = stream.begins[epoch]
        await stream.until(at + settle_tokens)
        spaces = stream.spaces(start, start + settle_tokens) + stream.spaces(at, at + settle_tokens)
        copying_s, copied = copying(told)
        return Move(
            resident_tokens=len(stream.spec.prompt_token_ids) + at - 1,
            gap_s=stream.arrivals[at] - stream.arrivals[at - 1],
            itl_s=statistics.median(spaces),
            copying_s=copying_s,
            copied_bytes=copied.transfer_bytes,
            tail_bytes=told[-1][1].transfer_bytes - copied.transfer_bytes,
            rounds=copied.rounds,
            frozen_s=convert.duration_s(told[-1][1].frozen_duration),
        )

    def cancel(self, stream: Stream) -> None:
        """End a stream."""
        stream.link.leave(stream, stream.spec.request_id)
        stream.link.cancel(stream.spec.request_id, stream.spec.epoch)

    async def close(self) -> None:
        """End all links."""
        for link in self.links.values():
            await link.close()
        await self._channels.close()
        await self._ledger.close()

    async def _migrate(self, stream: Stream, target: Member) -> Told:
        """Ask the source to move a stream. Returns what it tells, with the times."""
        request = decode_pb2.MigrateRequest(
            request_id=stream.spec.request_id,
            epoch=stream.spec.epoch,
            target_instance_id=target.name,
            target_address=self._processes.address(target.name),
            reason=decode_pb2.MIGRATION_REASON_OPERATOR,
        )
        stub = decode_pb2_grpc.DecodeServiceStub(self._channels.get(self._processes.address(stream.member.name)))
        return [(time.perf_counter(), told) async for told in stub.Migrate(request, timeout=MOVE_TIMEOUT_S)]

    async def _prefill(self, stream: Stream, waits_since_s: float) -> None:
        """Prefill all tokens of a stream, whose client waits for the next one, and hand it over to its instance."""
        stub = prefill_pb2_grpc.PrefillServiceStub(self._channels.get(self._processes.address("prefill")))
        sequence = convert.spec_pb(stream.spec)
        sequence.output_token_ids[:] = stream.token_ids
        response = await stub.Prefill(prefill_pb2.PrefillRequest(sequence=sequence), timeout=PREFILL_TIMEOUT_S)
        stream.add([response.token_id], stream.spec.epoch)
        stream.waited_s = stream.arrivals[-1] - waits_since_s
        sequence.output_token_ids[:] = stream.token_ids
        timeout = convert.duration_pb(TTL_S)
        stream.link.start(stream, decode_pb2.StartSequence(sequence=sequence, ticket=response.ticket, timeout=timeout))
        await stream.until(len(stream.token_ids) + 1)


def _no_stray(move: decode_pb2.SequenceMove) -> None:
    raise AssertionError(f"nobody goes along with {move}")
