"""The source's calls that wait for what their target makes of them.

A call that is repeated waits beside the first, and one answer answers both. Whoever called may have gone: its wait is
cancelled, and nobody minds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Generic, TypeVar

import grpc

from starmesh.migration.table import ProtocolError
from starmesh.rpc.status import StatusError

A = TypeVar("A")

MAX_WAITING_CALLS: Final = 4
"""A source has one call, and perhaps one more that it has given up."""


class WaitingCalls(Generic[A]):
    """Calls of one migration, answered by an ``A``."""

    def __init__(self) -> None:
        self._calls: list[asyncio.Future[A]] = []

    async def ask(self, happen: Callable[[], None]) -> A:
        """Wait for the answer to what ``happen`` brings about. Raises StatusError: FAILED_PRECONDITION when ``happen``
        raises ProtocolError, ABORTED when there will be no answer."""
        if len(self._calls) >= MAX_WAITING_CALLS:
            raise _out_of_place("too many calls of this migration wait")
        call: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._calls.append(call)
        try:
            happen()
            return await call
        except ProtocolError as error:
            raise _out_of_place(str(error)) from None
        finally:
            self._calls.remove(call)

    def answer(self, answer: A) -> None:
        """Answer all that wait."""
        for call in self._calls:
            if not call.done():
                call.set_result(answer)

    def leave(self) -> None:
        """Let all that wait know that they get no answer."""
        for call in self._calls:
            if not call.done():
                call.set_exception(
                    StatusError(grpc.StatusCode.ABORTED, "the target has given this migration up; ask the ledger")
                )


def _out_of_place(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.FAILED_PRECONDITION, f"{message}; nothing has changed")
