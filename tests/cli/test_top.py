"""``starmesh top``: what a frame shows, that it fits, and a terminal that is as it was afterwards."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import socket
import sys
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from starmesh.cli import status
from starmesh.cli.router import RouterClient, connect
from starmesh.cli.run import CliError
from starmesh.cli.status import show_status
from starmesh.cli.top import quits, show_once, show_top
from starmesh.cli.top_view import TopView
from starmesh.v1 import cluster_pb2, decode_pb2
from tests.router.conftest import TIMEOUT_S, Mesh, mesh

__all__ = ["mesh"]


def response(decodes: int = 3, *, moves: int = 2, rounds: int = 2) -> cluster_pb2.WatchClusterResponse:
    made = cluster_pb2.WatchClusterResponse(
        active_requests=7, queued_requests=1, ledger_available=True, router_id="router-0"
    )
    made.observe_time.FromSeconds(3661)
    for number in range(decodes):
        instance = made.instances.add(
            instance_id=f"decode-{number}",
            role=cluster_pb2.ROLE_DECODE,
            state=cluster_pb2.INSTANCE_STATE_READY,
            reserved_tokens=80,
            predicted_tokens=20_000,
            peak_tokens=1_000 + 300 * number,
        )
        instance.layout.block_tokens = 16
        load = instance.load
        load.total_blocks, load.free_blocks, load.resident_tokens = 100, 60 - number % 60, 640 + number
        load.running_sequences = number
    made.instances.add(instance_id="router-0", role=cluster_pb2.ROLE_ROUTER, state=cluster_pb2.INSTANCE_STATE_READY)
    for latency, milliseconds in ((made.activity.ttft, 120), (made.activity.tpot, 8), (made.activity.end_to_end, 9400)):
        latency.count = 5
        for quantile in (latency.p50, latency.p90, latency.p99, latency.p99_history.add()):
            quantile.FromMilliseconds(milliseconds)
    made.activity.window.seconds = 300
    made.predictor.version = "one"
    made.predictor.qualities.add(estimates=9, mae_tokens=41, coverage=0.9)
    for number in range(moves):
        move = made.migrations.add(
            request_id=f"request-{number}",
            source_instance_id="decode-0",
            target_instance_id="decode-1",
            reason=decode_pb2.MIGRATION_REASON_PREDICTED_LOAD,
            outcome=cluster_pb2.MIGRATION_OUTCOME_MOVED,
        )
        move.gap.FromMilliseconds(31)
    for number in range(rounds):
        told = made.rounds.add(leader_instance_id="rescheduler-0", policy="star", rounds=4)
        told.skipped_sequences["no_gain"] = 12
        if number % 2:
            told.planned_moves, told.spread_before_tokens, told.spread_after_tokens = 1, 900.0, 100.0
            told.moves.add(reason=decode_pb2.MIGRATION_REASON_MEMORY)
    return made


def frame(shown: cluster_pb2.WatchClusterResponse, *, width: int = 80, height: int | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(TopView(shown, {"decode-0": 12.4}, height=height))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


@pytest.mark.fast
def test_a_frame_shows_the_cluster() -> None:
    lines = frame(response())
    text = "\n".join(lines)
    assert lines[0].startswith("starmesh top  router-0  01:01:01 UTC") and lines[0].endswith("q quits")
    for part in (
        "requests 7 active, 1 queued",
        "TTFT         120 ms",
        "end to end    9.4 s",
        "predictor: one; mean error 41 tokens, 90% within its upper bound",
        "request-0 decode-0 → decode-1 moved predicted load, gap 31 ms",
        "4 rounds by rescheduler-0: nothing to move (12 no gain)",
        "star moves 1 (1 memory), spread 900 → 100 tokens; stay: 12 no gain",
        "router-0 ready",
    ):
        assert part in text, (part, text)
    (first,) = (line for line in lines if line.startswith("decode-0"))
    # 40 % used, 5 % reserved, the peak at 62 % of 1,600 tokens.
    assert "████████▒···│" in first.replace("▒▒", "▒·") and "40%" in first
    assert first.split()[-5:] == ["640", "20.0k", "0", "0", "12"]


@pytest.mark.fast
def test_a_ledger_that_is_away_is_said() -> None:
    shown = response()
    shown.ledger_available = False
    assert "the ledger does not answer" in frame(shown)[0]


@pytest.mark.fast
def test_nothing_is_no_failure() -> None:
    shown = cluster_pb2.WatchClusterResponse(ledger_available=True)
    shown.observe_time.FromSeconds(1)
    text = "\n".join(frame(shown))
    assert "nothing has moved yet" in text and "no rescheduler leads" in text


@pytest.mark.fast
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 80), st.integers(0, 64), st.integers(0, 32), st.integers(78, 200), st.integers(20, 80))
def test_a_frame_fits(decodes: int, moves: int, rounds: int, width: int, height: int) -> None:
    lines = frame(response(decodes, moves=moves, rounds=rounds), width=width, height=height)
    assert len(lines) <= height and max(map(len, lines)) <= width
    hidden = [line for line in lines if line.startswith("and ")]
    assert sum(line.startswith("decode-") for line in lines) == decodes or hidden


@pytest.mark.fast
@pytest.mark.parametrize("pressed", [b"q", b"Q", b"\x1b", b"qq"])
def test_q_and_escape_quit(pressed: bytes) -> None:
    assert quits(pressed)


@pytest.mark.fast
@pytest.mark.parametrize("pressed", [b"\x1b[A", b"\x1bOB", b"\x1b[<65;10;10M", b" ", b"x", b""])
def test_no_other_key_does(pressed: bytes) -> None:
    assert not quits(pressed)


async def test_one_frame_for_pipes(mesh: Mesh) -> None:
    await mesh.start()
    async for _ in mesh.generate():
        pass
    console = Console(file=io.StringIO(), width=80)
    async with connect(mesh.process.address) as router:
        await show_once(router, console)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        assert "decode-0" in text and "TTFT" in text and "\x1b" not in text
        with pytest.raises(CliError, match="--once"):
            await show_top(router, console, interval_s=0.1)


async def in_terminal(address: str, keys: bytes) -> tuple[int, bytes]:
    """Run the command in a terminal of 24 lines of 80, send ``keys`` once it shows something. Returns exit code and
    what it wrote."""
    loop = asyncio.get_running_loop()
    master, slave = pty.openpty()
    written, shown, ended = bytearray(), asyncio.Event(), asyncio.Event()

    def read() -> None:
        try:
            written.extend(os.read(master, 65536))
        except OSError:  # nobody has the terminal open any more
            loop.remove_reader(master)
            ended.set()
        if b"decode-0" in written:
            shown.set()

    loop.add_reader(master, read)
    arguments = ["-m", "starmesh.cli", "top", "--address", address, "--interval", "0.1"]
    environment = os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # makes it the controlling one, for Ctrl-C
    )
    os.close(slave)
    try:
        async with asyncio.timeout(3 * TIMEOUT_S):
            await shown.wait()
            os.write(master, keys)
            code = await process.wait()
            await ended.wait()  # what it wrote last
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        loop.remove_reader(master)
        os.close(master)
    return code, bytes(written)


@pytest.mark.parametrize(("keys", "code"), [(b"q", 0), (b"\x03", 130)], ids=["q", "ctrl-c"])
async def test_the_terminal_is_given_back(mesh: Mesh, keys: bytes, code: int) -> None:
    await mesh.start()
    ended, written = await in_terminal(mesh.process.address, keys)
    assert ended == code
    entered, left = written.find(b"\x1b[?1049h"), written.rfind(b"\x1b[?1049l")
    assert 0 <= entered < left, "the other screen is entered and left"
    assert written.rfind(b"\x1b[?25h") > written.rfind(b"\x1b[?25l"), "the cursor is shown again"
    assert b"Traceback" not in written


async def test_it_ends_with_the_router(mesh: Mesh) -> None:
    await mesh.start()
    router: RouterClient
    async with connect(mesh.process.address) as router:
        console = Console(file=io.StringIO(), width=80, force_terminal=True)
        watching = asyncio.create_task(show_top(router, console, interval_s=0.1))
        async with asyncio.timeout(TIMEOUT_S):
            while "decode-0" not in console.file.getvalue():  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
        mesh.process.router.stopping.set()
        with pytest.raises(CliError, match="the router has stopped"):
            await watching


@pytest.mark.parametrize("show", [show_once, show_status])
async def test_a_router_that_stops_has_no_frame_to_print(
    mesh: Mesh, show: Callable[[RouterClient, Console], Awaitable[None]]
) -> None:
    await mesh.start()
    mesh.process.router.stopping.set()
    async with connect(mesh.process.address) as router:
        with pytest.raises(CliError, match="is stopping"):
            await show(router, Console(file=io.StringIO()))


@pytest.mark.parametrize("show", [show_once, show_status])
async def test_what_never_answers_is_told_of(
    show: Callable[[RouterClient, Console], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "CALL_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with connect(f"127.0.0.1:{silent.getsockname()[1]}") as router:
            with pytest.raises(CliError, match="no answer within"):
                await show(router, Console(file=io.StringIO()))
