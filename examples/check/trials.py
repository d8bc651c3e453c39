"""What each client must show, one function for each: it runs the client and looks at the cluster, and raises Unexpected
(or lets a call's failure through) when something else happens.

Owns no table and no clusters.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

from examples.check.client import RUN_TIMEOUT_S, Client
from examples.check.clusters import CALL_TIMEOUT_S, Cluster, Security
from examples.check.relay import relay_to
from starmesh.v1 import inference_pb2

Trial = Callable[[Client, Cluster], Awaitable[None]]

LONG: Final = "emulate prompt_tokens=64 output_tokens=20000"
"""An answer that takes minutes: its trial ends it."""
_CUTS = 2
_MORE_TOKENS = 100
_WRONG_KEY = "sm-wrong-00000000000000000000000000000000"


async def stream(client: Client, cluster: Cluster) -> None:
    """Streams an answer to its end, every token once and in order, and reads the usage."""
    ended = await client.run(cluster.address, "emulate prompt_tokens=64 output_tokens=150")
    summary = ended.expect_answer("STOP")
    ended.expect((summary.prompt_tokens, summary.output_tokens) == (64, 150), "64 prompt and 150 output tokens")


async def cancel(client: Client, cluster: Cluster) -> None:
    """Cancels by the Cancel RPC; router and instances have let go of the request then."""
    request_id = _name(client)
    flags = ("--request-id", request_id, "--tokens", "20000", "--cancel-after", "10")
    ended = await client.run(*flags, cluster.address, LONG)
    summary = ended.expect_answer("CANCELLED")
    ended.expect(10 <= summary.output_tokens < 2000, "to be cancelled soon after 10 tokens")
    await cluster.wait_until_gone(request_id)


async def end_the_call(client: Client, cluster: Cluster) -> None:
    """Ends the call of a request without a resume window: that cancels it, too."""
    request_id = _name(client)
    flags = ("--request-id", request_id, "--tokens", "20000", "--cancel-after", "10", "--resume-window", "0")
    ended = await client.run(*flags, cluster.address, LONG)
    ended.expect(ended.code == 0 and "[cancelled by ending the call: " in ended.said, "to end its call")
    await cluster.wait_until_gone(request_id)


async def deadline(client: Client, cluster: Cluster) -> None:
    """Runs into its deadline; nothing goes on behind it."""
    request_id = _name(client)
    flags = ("--request-id", request_id, "--tokens", "20000", "--deadline", "1.5")
    ended = await client.run(*flags, cluster.address, LONG)
    ended.expect_error("DEADLINE_EXCEEDED", "what was printed stays valid; allow more time")
    await cluster.wait_until_gone(request_id)


async def bad_field(client: Client, cluster: Cluster) -> None:
    """Is refused for one field, and reads its name from BadRequest."""
    ended = await client.run("--tokens", "0", cluster.address, "hello")
    ended.expect_error("INVALID_ARGUMENT", "change sampling.max_output_tokens: must be 1 to ")


async def nobody_there(client: Client, cluster: Cluster) -> None:
    """Says what to look at when nobody listens."""
    ended = await client.run("127.0.0.1:1", "hello")
    ended.expect_error("UNAVAILABLE", "see whether a router listens there")


async def no_ca_file(client: Client, cluster: Cluster) -> None:
    """Says that it cannot read the CA's file, instead of trusting others or none."""
    ended = await client.run("--ca", "missing.crt", cluster.address, "hello")
    ended.expect(ended.code == 2 and "missing.crt" in ended.said, "to be told of the file")


async def resume(client: Client, cluster: Cluster) -> None:
    """Goes on through two cuts of its connection with Resume: no token is lost, none comes twice."""
    request_id = _name(client)
    arguments = ("--request-id", request_id, "--tokens", "20000")
    async with relay_to(cluster.address) as relay, client.start(*arguments, relay.address, LONG) as run:
        for _ in range(_CUTS):
            await run.more_tokens(_MORE_TOKENS)
            relay.cut()
            async with asyncio.timeout(RUN_TIMEOUT_S):
                await relay.wait_until_connected()
        await run.more_tokens(_MORE_TOKENS)
        await cluster.cancel(request_id)
        ended = await run.end()
    summary = ended.expect_answer("CANCELLED")
    ended.expect(summary.resumes >= _CUTS, f"{_CUTS} resumes")


async def migration(client: Client, cluster: Cluster) -> None:
    """Sees nothing of a move to another instance but its count in the usage."""
    request_id = _name(client)
    async with client.start("--request-id", request_id, "--tokens", "20000", cluster.address, LONG) as run:
        await cluster.move(request_id)
        await run.more_tokens(_MORE_TOKENS)
        await cluster.cancel(request_id)
        ended = await run.end()
    summary = ended.expect_answer("CANCELLED")
    ended.expect(summary.migrations == 1, "one migration")


async def tls_and_key(client: Client, cluster: Cluster) -> None:
    """Streams over TLS, the router verified by its CA, with an API key."""
    security = _security(cluster)
    flags = ("--ca", str(security.ca), "--api-key", security.key, cluster.address)
    ended = await client.run(*flags, "emulate prompt_tokens=64 output_tokens=50")
    ended.expect_answer("STOP")


async def no_key(client: Client, cluster: Cluster) -> None:
    """Is refused without a key, and says to give one."""
    ended = await client.run("--ca", str(_security(cluster).ca), cluster.address, "hello")
    ended.expect_error("UNAUTHENTICATED", "give a valid key with --api-key")


async def wrong_key(client: Client, cluster: Cluster) -> None:
    """Is refused with a key that the router doesn't know."""
    ended = await client.run("--ca", str(_security(cluster).ca), "--api-key", _WRONG_KEY, cluster.address, "hello")
    ended.expect_error("UNAUTHENTICATED", "give a valid key with --api-key")


async def busy_key(client: Client, cluster: Cluster) -> None:
    """Is told when to ask again, by RetryInfo, while its key has as many requests running as it may."""
    security = _security(cluster)
    metadata = (("authorization", f"Bearer {security.busy_key}"),)
    request = inference_pb2.GenerateRequest(request_id=_name(client), text=LONG)
    request.sampling.max_output_tokens = 20000
    call = cluster.inference.Generate(request, timeout=CALL_TIMEOUT_S * 3, metadata=metadata)
    try:
        await call.read()
        flags = ("--ca", str(security.ca), "--api-key", security.busy_key, cluster.address)
        ended = await client.run(*flags, "hello")
    finally:
        call.cancel()
    ended.expect_error("RESOURCE_EXHAUSTED", "ask again after 1 s")


async def wrong_ca(client: Client, cluster: Cluster) -> None:
    """Refuses a router whose certificate another CA has signed."""
    security = _security(cluster)
    flags = ("--ca", str(security.stranger_ca), "--api-key", security.key, cluster.address)
    (await client.run(*flags, "hello")).expect_error("UNAVAILABLE", "see whether a router listens there")


async def plaintext_to_tls(client: Client, cluster: Cluster) -> None:
    """Gets nowhere without TLS where the router wants it, and says so."""
    ended = await client.run("--api-key", _security(cluster).key, cluster.address, "hello")
    ended.expect_error("UNAVAILABLE", "see whether a router listens there, and whether it wants TLS (--ca)")


PLAIN: Final[tuple[Trial, ...]] = (
    *(stream, cancel, end_the_call, deadline, bad_field, nobody_there, no_ca_file, resume, migration),
)
"""Those at a cluster without TLS and keys."""
SECURED: Final[tuple[Trial, ...]] = (tls_and_key, no_key, wrong_key, busy_key, wrong_ca, plaintext_to_tls)
"""Those at a router with both."""


def _name(client: Client) -> str:
    return f"{client.language}-{secrets.token_hex(4)}"


def _security(cluster: Cluster) -> Security:
    assert cluster.security is not None
    return cluster.security
