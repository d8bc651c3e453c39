"""Appends rounds to a file, off the event loop, up to a size.

Owns the file. Owns neither the line (``starmesh.policy.rescheduling.record``) nor reading it back (``replay``). A
recording that cannot go on ends with one log line; rescheduling goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
from pathlib import Path
from typing import Final

from starmesh.policy.rescheduling.record import RecordedRound, encode_round

log = logging.getLogger(__name__)

_QUEUE_ROUNDS: Final = 8
_BLOCK_BYTES: Final = 1 << 16


class Recorder:
    """Records rounds until ``max_bytes``; those that come faster than they can be written are left out, and said."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Opens the file; a round that an earlier process left half written is cut off. Raises OSError."""
        self._path = path
        self._max_bytes = max_bytes
        self._file = _open_whole_lines(path)
        self._size = self._file.seek(0, os.SEEK_END)
        self._queue: asyncio.Queue[RecordedRound | None] = asyncio.Queue(_QUEUE_ROUNDS)
        self._writing = asyncio.create_task(self._write_all(), name="recorder")

    def add(self, recorded: RecordedRound) -> None:
        """Write a round in the background."""
        if self._writing.done():
            return
        try:
            self._queue.put_nowait(recorded)
        except asyncio.QueueFull:
            log.warning("%s is written too slowly: a round is left out", self._path)

    async def close(self) -> None:
        """Write what is queued, and close the file."""
        if not self._writing.done():
            await self._queue.put(None)
        await asyncio.wait([self._writing])
        await asyncio.to_thread(self._file.close)

    async def _write_all(self) -> None:
        while (recorded := await self._queue.get()) is not None:
            try:
                # Writing out a large cluster takes longer than planning it.
                fits = await asyncio.to_thread(self._append, recorded)
            except (OSError, ValueError) as error:
                log.error("recording to %s ends: %s", self._path, error)
                break
            if not fits:
                log.warning("recording to %s ends at %d bytes; see --record-max-mib", self._path, self._size)
                break
        # Nobody waits for room in the queue once this has ended.
        with contextlib.suppress(asyncio.QueueEmpty):
            while True:
                self._queue.get_nowait()

    def _append(self, recorded: RecordedRound) -> bool:
        line = encode_round(recorded).encode() + b"\n"
        if self._size + len(line) > self._max_bytes:
            return False
        unwritten = memoryview(line)
        while unwritten:
            unwritten = unwritten[self._file.write(unwritten) :]
        self._size += len(line)
        return True


def _open_whole_lines(path: Path) -> io.FileIO:
    """The file to append to, without what follows its last line's end. Unbuffered: what is written is there after a
    kill -9 too."""
    file = io.FileIO(path, "a+")
    try:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            newline = os.pread(file.fileno(), end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)
    except BaseException:
        file.close()
        raise
    return file
