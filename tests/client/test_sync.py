"""The client of programs without an event loop: from any thread, and out of it by Ctrl-C."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import grpc
import pytest

from starmesh.client import ClientError, FinishReason, SyncClient
from tests.client.conftest import PATIENT, Surroundings, check_pieces
from tests.router.conftest import TIMEOUT_S, Mesh, text_of, tokens_after, until


@pytest.fixture
async def client(mesh: Mesh) -> AsyncIterator[SyncClient]:
    """Of a mesh with two decode instances."""
    await mesh.start(decodes=2)
    with SyncClient(mesh.process.address, timeout_s=TIMEOUT_S, retries=PATIENT) as client:
        yield client
        # What it still tells the router needs the router's loop, which is this one.
        await asyncio.to_thread(client.close)


async def test_pieces_and_whole_answers(mesh: Mesh, client: SyncClient) -> None:
    pieces = await asyncio.to_thread(lambda: list(client.generate("hello", max_output_tokens=20)))
    check_pieces(pieces, "hello", 20)
    text = await asyncio.to_thread(client.text, "hello", max_output_tokens=20)
    assert text == text_of(tokens_after("hello", 20))
    chat = client.chat([{"role": "user", "content": "hi"}], max_output_tokens=5)
    answer = await asyncio.to_thread(chat.whole)
    assert answer.token_ids == chat.token_ids == tuple(tokens_after("user:hi;", 5))
    await mesh.nothing_left()


async def test_many_threads_share_a_client(mesh: Mesh, client: SyncClient) -> None:
    def one(number: int) -> None:
        text = f"prompt {number}"
        check_pieces(list(client.generate(text, max_output_tokens=20)), text, 20)

    await asyncio.gather(*(asyncio.to_thread(one, number) for number in range(12)))
    await mesh.nothing_left()


async def test_errors_are_the_same(mesh: Mesh, client: SyncClient) -> None:
    with pytest.raises(ClientError) as caught:
        await asyncio.to_thread(client.text, "hello", top_p=2.0)
    assert (caught.value.code, caught.value.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("sampling.top_p",))


@pytest.mark.parametrize("way", ["block", "let go", "client"])
async def test_whoever_leaves_early_cancels_the_request(mesh: Mesh, client: SyncClient, way: str) -> None:
    for decode in mesh.decodes:
        decode.pause_after = 5

    def leave() -> None:
        stream = client.generate("hello", request_id="gone", max_output_tokens=20)
        if way == "block":
            with stream:
                next(stream)
            return
        next(stream)
        if way == "client":
            client.close()
        del stream
        gc.collect()

    await asyncio.to_thread(leave)
    await until(lambda: [each for decode in mesh.decodes for each in decode.cancelled] == [("gone", 1)])
    await mesh.nothing_left()


async def test_cancel_from_another_thread(mesh: Mesh, client: SyncClient) -> None:
    for decode in mesh.decodes:
        decode.pause_after = 5
    stream = client.generate("hello", max_output_tokens=20)
    reading = asyncio.create_task(asyncio.to_thread(stream.whole))
    await until(lambda: len(stream.token_ids) == 5)
    await asyncio.to_thread(stream.cancel)
    answer = await reading
    assert (answer.finish_reason, len(answer.token_ids)) == (FinishReason.CANCELLED, 5)
    await mesh.nothing_left()


async def test_a_closed_client_says_so(mesh: Mesh, client: SyncClient) -> None:
    await asyncio.to_thread(client.close)
    await asyncio.to_thread(client.close)
    with pytest.raises(RuntimeError, match="closed"):
        client.text("hello")
    assert not any(thread.name == "starmesh client" for thread in threading.enumerate())


ENDLESS = """
import sys
from starmesh.client import SyncClient

with SyncClient(sys.argv[1]) as client:
    for piece in client.generate("hello", request_id="endless", max_output_tokens=20):
        print(piece.text, end="", flush=True)
"""
LET_GO = """
import sys
from starmesh.client import SyncClient

client = SyncClient(sys.argv[1])
stream = client.generate("hello", request_id="endless", max_output_tokens=20)
print(next(stream).text, flush=True)
"""


@pytest.mark.parametrize("script", [ENDLESS, LET_GO], ids=["Ctrl-C", "end of the program"])
async def test_a_program_that_ends_cancels_its_request(mesh: Mesh, surroundings: Surroundings, script: str) -> None:
    await mesh.start()
    mesh.decodes[0].pause_after = 5
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, mesh.process.address), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(4 * TIMEOUT_S):  # programs start slowly on a busy machine
            assert program.stdout is not None
            assert await program.stdout.readexactly(1) == text_of(tokens_after("hello", 1)).encode()
            if script is ENDLESS:
                program.send_signal(signal.SIGINT)
            _, errors = await program.communicate()
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    if script is ENDLESS:
        assert program.returncode == -signal.SIGINT
        assert errors.decode().splitlines()[-1] == "KeyboardInterrupt"
    else:
        assert (program.returncode, errors) == (0, b"")
    await until(lambda: mesh.decodes[0].cancelled == [("endless", 1)])
    await mesh.nothing_left()


async def test_the_import_is_light() -> None:
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import starmesh.client, sys; print(*sys.modules)"), stdout=subprocess.PIPE
    )
    output, _ = await program.communicate()
    modules = set(output.decode().split())
    assert not modules & {"torch", "transformers", "tokenizers", "numpy", "redis", "pydantic", "typer"}
