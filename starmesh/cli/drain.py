"""``starmesh drain``: takes an instance out of dispatch and waits until it has nothing left."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
from rich.console import Console

from starmesh.cli.router import CALL_TIMEOUT_S, RouterClient
from starmesh.cli.run import CliError
from starmesh.rpc.status import from_rpc_error
from starmesh.v1 import cluster_pb2

_POLL_S = 0.5


async def drain(router: RouterClient, instance_id: str, console: Console, *, wait: bool, timeout_s: float) -> None:
    """Start the drain; with ``wait`` return when the instance has drained or gone.

    An API key that has used up its limits is given the time that the router asks for. Raises CliError when the instance
    still has sequences after ``timeout_s``; it goes on draining then.
    """
    request = cluster_pb2.DrainRequest(instance_id=instance_id)
    deadline_s = time.monotonic() + timeout_s
    reported: int | None = None
    while True:
        # Idempotent, so that asking again is how to see how far it is.
        try:
            response = await router.cluster.Drain(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND and reported is not None:
                console.print(f"{instance_id} has gone")
                return
            delay_s = from_rpc_error(error).retry_delay_s
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or delay_s is None:
                raise
            if time.monotonic() + delay_s > deadline_s:
                if reported is None:
                    raise
                raise _not_in_time(instance_id, reported, timeout_s) from None
            await asyncio.sleep(max(delay_s, _POLL_S))
            continue
        if response.state == cluster_pb2.INSTANCE_STATE_DRAINED:
            console.print(f"{instance_id} has drained; it may be stopped")
            return
        if response.remaining_sequences != reported:
            reported = response.remaining_sequences
            console.print(f"{instance_id} is draining, {_sequences(reported)} left")
        if not wait:
            return
        if time.monotonic() > deadline_s:
            raise _not_in_time(instance_id, reported, timeout_s)
        await asyncio.sleep(_POLL_S)


def _not_in_time(instance_id: str, sequences: int, timeout_s: float) -> CliError:
    return CliError(f"{instance_id} still has {_sequences(sequences)} after {timeout_s:g} s; it goes on draining")


def _sequences(count: int) -> str:
    return f"{count} sequence{'s' * (count != 1)}"
