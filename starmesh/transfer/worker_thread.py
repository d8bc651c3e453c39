"""Work on block memory that a coroutine starts, and that never outlives the coroutine's await.

Bytes that land late, in blocks that their owner has freed since, would corrupt another sequence. So a cancelled pull
waits for what it has started before it lets the cancellation through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


async def in_thread(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Run ``function`` on a thread of the loop's pool, and see it to its end even when cancelled."""
    return await to_its_end(asyncio.to_thread(function, *args, **kwargs))


async def to_its_end(work: Coroutine[Any, Any, Result], *, on_cancel: Callable[[], None] | None = None) -> Result:
    """Await ``work`` in a task of its own. When cancelled, call ``on_cancel``, wait for the task's end, then raise."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        await outlast(task)
        raise


async def outlast(*tasks: asyncio.Future[Any]) -> None:
    """Wait until all ``tasks`` have ended, however often the waiter is cancelled; whatever they raise is dropped."""
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            continue  # the caller is on its way out already, with a reason of its own
    for task in tasks:
        if not task.cancelled():
            task.exception()
