"""The router as the command line sees it: its two public services over one channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starmesh.cli.login import Login
from starmesh.cli.run import CliError
from starmesh.rpc.client_channel import open_client_channel
from starmesh.rpc.credentials import TlsError
from starmesh.v1 import cluster_pb2_grpc, inference_pb2_grpc

CALL_TIMEOUT_S = 10.0
"""Deadline of calls that answer at once."""


@dataclass(frozen=True, slots=True)
class RouterClient:
    """The stubs of one router."""

    inference: inference_pb2_grpc.InferenceServiceAsyncStub
    cluster: cluster_pb2_grpc.ClusterServiceAsyncStub


@asynccontextmanager
async def connect(address: str, login: Login | None = None) -> AsyncIterator[RouterClient]:
    """A client of the router at ``address``; calls fail with UNAVAILABLE when nobody answers there. Raises CliError for
    a CA file that cannot be used, and for a key that would go unencrypted."""
    login = login or Login()
    try:
        opened = open_client_channel(address, ca=login.ca, api_key=login.api_key)
    except TlsError as error:
        raise CliError(str(error)) from None
    async with opened as channel:
        inference: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        cluster: cluster_pb2_grpc.ClusterServiceAsyncStub = cluster_pb2_grpc.ClusterServiceStub(channel)
        yield RouterClient(inference, cluster)
