"""Callers that push samples at a predictor as fast as it takes them:
``python -m benchmarks.prediction_cost.flood ADDRESS REVISION LAYERS WIDTH``, until it is killed."""

from __future__ import annotations

import asyncio
import itertools
import sys

import grpc.aio
import numpy as np

from starmesh.rpc.channels import open_channel
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc

CALLERS = 8
CALL_SAMPLES = 32
EVERY_TOKENS = 20
LIFE_TOKENS = 2000


async def call(
    stub: predictor_pb2_grpc.PredictorServiceAsyncStub, layout: predictor_pb2.HiddenLayout, who: int
) -> None:
    """One caller, of ``CALL_SAMPLES`` sequences of ``LIFE_TOKENS`` each; a refused call is followed by the next."""
    draw = np.random.default_rng(who)
    states = draw.normal(size=(CALL_SAMPLES, len(layout.layers), layout.width)).astype("<f2")
    for number in itertools.count():
        life, position = divmod(number * EVERY_TOKENS, LIFE_TOKENS)
        samples = [
            predictor_pb2.PredictionSample(
                request_id=f"flood-{who}-{life}-{row}",
                prompt_tokens=50,
                output_tokens=position,
                hidden_state=state.tobytes(),
            )
            for row, state in enumerate(states)
        ]
        asked = predictor_pb2.PredictRequest(instance_id=f"flood-{who}", layout=layout, samples=samples)
        try:
            await stub.Predict(asked, timeout=1.0)
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0)


async def flood(address: str, layout: predictor_pb2.HiddenLayout) -> None:
    async with open_channel(address) as channel:
        stub: predictor_pb2_grpc.PredictorServiceAsyncStub = predictor_pb2_grpc.PredictorServiceStub(channel)
        await asyncio.gather(*(call(stub, layout, who) for who in range(CALLERS)))


if __name__ == "__main__":
    _, at, revision, layers, width = sys.argv
    kept = predictor_pb2.HiddenLayout(model_revision=revision, layers=map(int, layers.split(",")), width=int(width))
    asyncio.run(flood(at, kept))
