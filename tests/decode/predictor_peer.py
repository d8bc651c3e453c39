"""A predictor on a socket that does what a test says: answers, or one of the ways not to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from starmesh.ledger.memory import MemoryLedger
from starmesh.rpc.server import SERVER_OPTIONS
from starmesh.types import InstanceInfo, RemainingEstimate, Role
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc, sequence_pb2
from tests.instance.running import PATIENCE_S

TOTAL_TOKENS = 1000
"""How long the predictor thinks that every sequence will be; the upper quantile is MARGIN_TOKENS more."""
MARGIN_TOKENS = 100

Answer = Callable[["PredictorPeer", predictor_pb2.PredictRequest, Any], Awaitable[predictor_pb2.PredictResponse]]


def estimated(output_tokens: int) -> RemainingEstimate:
    """What the predictor says at this position."""
    remaining = TOTAL_TOKENS - output_tokens
    return RemainingEstimate(output_tokens, remaining, remaining + MARGIN_TOKENS)


def response(found: Sequence[tuple[str, int, int, int]]) -> predictor_pb2.PredictResponse:
    """Estimates of requests: position, median, upper quantile."""
    return predictor_pb2.PredictResponse(
        estimates=[
            predictor_pb2.SampleEstimate(
                request_id=name,
                estimate=sequence_pb2.RemainingEstimate(
                    output_tokens=at, remaining_tokens=median, remaining_tokens_upper=upper
                ),
            )
            for name, at, median, upper in found
        ]
    )


def right(request: predictor_pb2.PredictRequest) -> list[tuple[str, int, int, int]]:
    """The estimates asked for."""
    found = []
    for sample in request.samples:
        estimate = estimated(sample.output_tokens)
        found.append(
            (sample.request_id, sample.output_tokens, estimate.remaining_tokens, estimate.remaining_tokens_upper)
        )
    return found


async def answers(peer: PredictorPeer, request: predictor_pb2.PredictRequest, context: Any) -> Any:
    return response(right(request))


async def hangs(peer: PredictorPeer, request: predictor_pb2.PredictRequest, context: Any) -> Any:
    """Answers once it is let go, if the caller still waits."""
    await peer.let_go.wait()
    return response(right(request))


async def refuses(peer: PredictorPeer, request: predictor_pb2.PredictRequest, context: Any) -> Any:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the predictor is for layers 3 of another model")


async def overloaded(peer: PredictorPeer, request: predictor_pb2.PredictRequest, context: Any) -> Any:
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")


async def says_nothing(peer: PredictorPeer, request: predictor_pb2.PredictRequest, context: Any) -> Any:
    return response([])


async def lies(peer: PredictorPeer, request: predictor_pb2.PredictRequest, context: Any) -> Any:
    """One estimate for each sample, none of which can be."""
    wrongs = [
        lambda name, at: ("somebody-else", at, 5, 6),
        lambda name, at: (name, at + 1, 5, 6),
        lambda name, at: (name, at, -5, 6),
        lambda name, at: (name, at, 9, 6),
        lambda name, at: (name, -1, 5, 6),
    ]
    peer.lies += 1
    return response([wrongs[peer.lies % len(wrongs)](one.request_id, one.output_tokens) for one in request.samples])


async def floods(peer: PredictorPeer, request: predictor_pb2.PredictRequest, context: Any) -> Any:
    return response(right(request) * 1_000)


class PredictorPeer:
    """Listens where it is registered. ``calls`` are those that came, newest last."""

    def __init__(self, ledger: MemoryLedger, answer: Answer) -> None:
        self.answer = answer
        self.calls: list[predictor_pb2.PredictRequest] = []
        self._in_flight = 0
        self.most_in_flight = 0
        self.let_go = asyncio.Event()
        self.lies = 0
        self.address = ""
        self.changed = asyncio.Event()
        self._ledger = ledger
        self._server: grpc.aio.Server | None = None

    @property
    def samples(self) -> list[predictor_pb2.PredictionSample]:
        return [sample for call in self.calls for sample in call.samples]

    @property
    def ends(self) -> list[tuple[str, int, Any]]:
        return [(end.request_id, end.output_tokens, end.finish_reason) for call in self.calls for end in call.ends]

    async def start(self, listen: str = "127.0.0.1:0") -> None:
        """Serve, and be in the ledger."""
        peer = self

        class Servicer(predictor_pb2_grpc.PredictorServiceServicer):
            async def Predict(self, request: Any, context: Any) -> Any:  # noqa: N802
                return await peer._predict(request, context)

        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        predictor_pb2_grpc.add_PredictorServiceServicer_to_server(Servicer(), self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(listen)}"
        await self._server.start()
        await self._ledger.register(InstanceInfo("predictor", "1", Role.PREDICTOR, self.address), ttl_s=600)

    async def die(self) -> None:
        """Be gone without a word: the ledger still has it."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for what only a call can bring about."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self.changed.wait()
                self.changed.clear()

    async def _predict(self, request: predictor_pb2.PredictRequest, context: Any) -> predictor_pb2.PredictResponse:
        self.calls.append(request)
        self.changed.set()
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return await self.answer(self, request, context)
        finally:
            self._in_flight -= 1


@asynccontextmanager
async def predictor_peer(ledger: MemoryLedger, answer: Answer = answers) -> AsyncIterator[PredictorPeer]:
    """A predictor that serves until the context ends."""
    peer = PredictorPeer(ledger, answer)
    await peer.start()
    try:
        yield peer
    finally:
        await peer.die()
