"""Load on a mesh while its predictor changes: clients that never stop, and a caller of the predictor itself."""

from __future__ import annotations

import asyncio

import grpc.aio
import numpy as np

from starmesh.v1 import inference_pb2_grpc, predictor_pb2, predictor_pb2_grpc
from tests.mesh.processes import until
from tests.mesh.streams import generate, request

CLIENTS = 8
CALL_SAMPLES = 4


class Traffic:
    """Clients that ask again as soon as they are answered, within the context. A request that fails fails the test."""

    def __init__(self, stub: inference_pb2_grpc.InferenceServiceAsyncStub, prompts: list[str]) -> None:
        self.answered = 0
        self._stub = stub
        self._prompts = prompts
        self._ended = False
        self._clients: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Traffic:
        self._clients = [asyncio.create_task(self._client(number)) for number in range(CLIENTS)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._ended = True
        await asyncio.gather(*self._clients)

    async def until_answered(self, more: int) -> None:
        """Wait for so many more answers."""
        before = self.answered
        await until(lambda: self.answered >= before + more, "answers to clients")

    async def _client(self, number: int) -> None:
        for seed in range(number, 1 << 31, CLIENTS):
            if self._ended:
                return
            prompt = self._prompts[seed % len(self._prompts)]
            await generate(self._stub, request(prompt, temperature=1.0, seed=seed, max_output_tokens=400))
            self.answered += 1


class Asker:
    """Calls the predictor without a pause within the context. A call that fails, or lacks an estimate, fails the test.
    ``versions`` are those that answered, without repetitions in a row."""

    def __init__(self, channel: grpc.aio.Channel, layout: predictor_pb2.HiddenLayout) -> None:
        self.calls = 0
        self.versions: list[str] = []
        self._stub: predictor_pb2_grpc.PredictorServiceAsyncStub = predictor_pb2_grpc.PredictorServiceStub(channel)
        self._layout = layout
        self._ended = False
        self._asking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Asker:
        self._asking = asyncio.create_task(self._ask())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._ended = True
        assert self._asking is not None
        await self._asking

    async def until_answered_by(self, version: str) -> None:
        """Wait for an answer of a version."""
        await until(lambda: self.versions[-1:] == [version], f"an answer of {version}")

    async def _ask(self) -> None:
        state = np.ones((len(self._layout.layers), self._layout.width), dtype="<f2").tobytes()
        while not self._ended:
            samples = [
                predictor_pb2.PredictionSample(
                    request_id=f"asked-{number}", prompt_tokens=8, output_tokens=20 * self.calls, hidden_state=state
                )
                for number in range(CALL_SAMPLES)
            ]
            asked = predictor_pb2.PredictRequest(instance_id="asker", layout=self._layout, samples=samples)
            answer = await self._stub.Predict(asked, timeout=30)
            assert len(answer.estimates) == CALL_SAMPLES
            self.calls += 1
            if self.versions[-1:] != [answer.version]:
                self.versions.append(answer.version)
