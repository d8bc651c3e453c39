"""The router as the command line sees it: its two public services over one channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starmesh.rpc.channels import open_channel
from starmesh.v1 import cluster_pb2_grpc, inference_pb2_grpc

CALL_TIMEOUT_S = 10.0
"""Deadline of calls that answer at once."""


@dataclass(frozen=True, slots=True)
class RouterClient:
    """The stubs of one router."""

    inference: inference_pb2_grpc.InferenceServiceAsyncStub
    cluster: cluster_pb2_grpc.ClusterServiceAsyncStub


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[RouterClient]:
    """A client of the router at ``address``; calls fail with UNAVAILABLE when nobody answers there."""
    async with open_channel(address) as channel:
        inference: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        cluster: cluster_pb2_grpc.ClusterServiceAsyncStub = cluster_pb2_grpc.ClusterServiceStub(channel)
        yield RouterClient(inference, cluster)
