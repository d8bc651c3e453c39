"""The engine's thread, and its face to the event loop.

Owns the thread, the queue of calls into it and the delivery of outputs out of it. A forward takes tens to hundreds of
milliseconds, so the core lives and steps on a thread of its own; everything else reaches it by ``call``, between two
steps. Decides nothing about sequences.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from starmesh.engine.block_pool import IntegrityError
from starmesh.engine.engine import EngineCore, SequenceOutput

T = TypeVar("T")


class EngineStopped(Exception):
    """The engine's thread is not running: it was not started, has been stopped, or has crashed."""


class EngineThread:
    """Runs the core that ``core_factory`` makes, on a daemon thread. Made in a running event loop, which it serves.

    The factory runs on the thread too, so it may load a model. ``on_outputs`` is called on the event loop with what
    each step made, in order. At most ``max_pending_calls`` calls are queued (more wait for a place), and the engine
    steps no further while ``max_pending_outputs`` steps' outputs wait for the event loop.

    ``failed`` is done once the core or ``on_outputs`` has crashed, with the exception as its result: nothing runs any
    more then, and the process should exit.
    """

    def __init__(
        self,
        core_factory: Callable[[], EngineCore],
        on_outputs: Callable[[list[SequenceOutput]], None],
        *,
        max_pending_calls: int = 1024,
        max_pending_outputs: int = 8,
    ) -> None:
        self._core_factory = core_factory
        self._on_outputs = on_outputs
        self._max_pending_outputs = max_pending_outputs
        self._call_places = asyncio.Semaphore(max_pending_calls)
        self._loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[BaseException] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards the fields below, which both sides touch; notified when the thread may have something to do.
        self._changed = threading.Condition()
        self._calls: deque[tuple[Callable[[EngineCore], Any], Future[Any]]] = deque()
        self._pending_outputs = 0
        self._running = False

    async def start(self) -> None:
        """Start the thread and wait until the core is made. Raises what the factory raises. Once only."""
        self._running = True
        made = self._enqueue(lambda core: None)
        self._thread.start()
        try:
            await asyncio.wrap_future(made)
        except EngineStopped:
            if self.failed.done():
                raise self.failed.result() from None
            raise
        except asyncio.CancelledError:
            self._halt()
            raise

    async def call(self, function: Callable[[EngineCore], T]) -> T:
        """Run ``function`` on the engine's thread before its next step; return its result or raise its exception.

        Calls run in the order in which they are made. One that is cancelled before its turn never runs; later it runs
        to its end, and its result is lost: make up for it with another call, which runs after it. Outputs of the steps
        before the call have reached ``on_outputs`` when this returns. Raises EngineStopped.
        """
        async with self._call_places:
            return await asyncio.wrap_future(self._enqueue(function))

    async def stop(self) -> None:
        """End the thread after the step it is in. Calls that have not run raise EngineStopped. Idempotent."""
        self._halt()
        if self._thread.ident is not None:
            await asyncio.shield(self._ended)

    def _enqueue(self, function: Callable[[EngineCore], T]) -> Future[T]:
        future: Future[T] = Future()
        with self._changed:
            if not self._running:
                raise EngineStopped("the engine is not running")
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def _halt(self) -> None:
        with self._changed:
            self._running = False
            self._changed.notify()

    def _run(self) -> None:
        try:
            core = self._core_factory()
            while self._wait(core):
                self._run_calls(core)
                if self._may_step(core):
                    outputs = core.step()
                    if outputs:
                        with self._changed:
                            self._pending_outputs += 1
                        self._post(self._deliver, outputs)
        except BaseException as error:
            self._post(self._fail, error)
        finally:
            with self._changed:
                self._running = False
                calls, self._calls = self._calls, deque()
            for _, future in calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineStopped("the engine has stopped"))
            self._post(self._end)

    def _wait(self, core: EngineCore) -> bool:
        """Sleep until there is something to do; False when it is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running or self._calls or self._may_step(core))
            return self._running

    def _may_step(self, core: EngineCore) -> bool:
        # A plain read: only the thread itself adds to the count, so at worst it waits for the next notice.
        return core.runnable and self._pending_outputs < self._max_pending_outputs

    def _run_calls(self, core: EngineCore) -> None:
        """Run what is queued now; what is queued meanwhile waits for the next turn, so that steps are not starved."""
        for _ in range(len(self._calls)):
            function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(core))
            except BaseException as error:
                future.set_exception(error)
                if isinstance(error, IntegrityError) or not isinstance(error, Exception):
                    raise

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            self._halt()  # the event loop is closed: nobody is left to serve

    # On the event loop:

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        try:
            self._on_outputs(outputs)
        except Exception as error:
            self._fail(error)
            self._halt()
        finally:
            with self._changed:
                self._pending_outputs -= 1
                self._changed.notify()

    def _fail(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_result(error)

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)
