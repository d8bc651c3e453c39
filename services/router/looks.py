"""What is asked of others now and then, for people who watch: the last answer is shown, and nobody waits for a new one.

Owns the pace and the one call under way. Owns no answer's meaning.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Look(Generic[T]):
    """Asks only while somebody wants to know."""

    def __init__(self, ask: Callable[[], Awaitable[T]], nothing: T, *, interval_s: float, patience_s: float) -> None:
        """``ask`` does not raise. Only the first answer is waited for, ``patience_s`` at most; until it comes there is
        ``nothing``."""
        self._ask = ask
        self._value = nothing
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self._next_s = self._loop.time()
        self._answered = False
        self._asking: asyncio.Task[None] | None = None

    async def value(self) -> T:
        """The last answer."""
        if self._asking is None and self._loop.time() >= self._next_s:
            self._asking = asyncio.create_task(self._look(), name="look")
        if self._asking is not None and not self._answered:
            await asyncio.wait({self._asking}, timeout=self._patience_s)
            self._answered = True
        return self._value

    async def close(self) -> None:
        """End the call under way."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})

    async def _look(self) -> None:
        try:
            self._value = await self._ask()
        finally:
            self._next_s = self._loop.time() + self._interval_s
            self._asking = None
