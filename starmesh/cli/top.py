"""``starmesh top``: the cluster in a full-screen terminal, until q or Ctrl-C.

Owns the asking, the screen and the keys. Owns nothing of what is shown (``top_view``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncGenerator, Callable, Iterator

from rich.console import Console
from rich.live import Live

from starmesh.cli.router import RouterClient
from starmesh.cli.run import CliError
from starmesh.cli.status import TokenRates, second
from starmesh.cli.top_view import TopView
from starmesh.v1 import cluster_pb2

_ONCE_INTERVAL_S = 0.5
_ESCAPE = b"\x1b"


async def views(router: RouterClient, *, interval_s: float) -> AsyncGenerator[TopView, None]:
    """Frame after frame; ends with the router's stream. Raises AioRpcError when that breaks."""
    # What is shown of sequences are sums, and the router makes them: the fewest it lists are enough.
    request = cluster_pb2.WatchClusterRequest(max_sequences=1)
    request.interval.FromNanoseconds(int(interval_s * 1e9))
    rates = TokenRates()
    # A stream that is meant to last has no deadline; keepalive notices a router that has gone.
    call = router.cluster.WatchCluster(request)
    try:
        async for response in call:
            yield TopView(response, rates.observe(response))
    finally:
        call.cancel()


def quits(pressed: bytes) -> bool:
    """Whether what came from the terminal at once is q or Escape. Arrows, and the wheel of a mouse, begin as Escape
    does."""
    return pressed[:1] in (b"q", b"Q") or pressed == _ESCAPE


async def show_once(router: RouterClient, console: Console) -> None:
    """Print one frame. Raises CliError for a router that does not answer or is stopping."""
    console.print(await second(views(router, interval_s=_ONCE_INTERVAL_S)))


async def show_top(router: RouterClient, console: Console, *, interval_s: float) -> None:
    """Show frames until q. Raises CliError where there is no terminal, and when the router ends the stream."""
    if not console.is_terminal:
        raise CliError("there is no terminal to fill; print one frame with --once")
    loop, quit_ = asyncio.get_running_loop(), asyncio.Event()
    watching = asyncio.create_task(_watch(router, console, interval_s), name="top")
    quitting = asyncio.create_task(quit_.wait(), name="keys")

    def on_press(pressed: bytes) -> None:
        if quits(pressed):
            quit_.set()

    try:
        with _keys(loop, on_press):
            await asyncio.wait({watching, quitting}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                await watching
                raise CliError("the router has stopped")
    finally:
        for task in (watching, quitting):
            task.cancel()
        await asyncio.gather(watching, quitting, return_exceptions=True)


async def _watch(router: RouterClient, console: Console, interval_s: float) -> None:
    loop = asyncio.get_running_loop()
    latest: TopView | None = None
    with Live(console=console, screen=True, auto_refresh=False, transient=True) as live:

        def draw() -> None:
            if latest is not None:
                live.update(TopView(latest.response, latest.rates, height=console.height), refresh=True)

        loop.add_signal_handler(signal.SIGWINCH, draw)
        try:
            async for view in views(router, interval_s=interval_s):
                latest = view
                draw()
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)


@contextlib.contextmanager
def _keys(loop: asyncio.AbstractEventLoop, on_press: Callable[[bytes], None]) -> Iterator[None]:
    """Have ``on_press`` hear of what is pressed, without an echo; of nothing where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    # Ctrl-C remains a signal.
    tty.setcbreak(descriptor)

    def read() -> None:
        on_press(os.read(descriptor, 64))

    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
