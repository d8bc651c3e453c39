"""One router's side of a Decode stream: what waits to be sent to it.

A step adds to the link with a plain call; the stream's writer takes all that has gathered. What waits is bounded by
the sequences that the instance takes and the tokens that each may generate.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starmesh.v1 import decode_pb2, sequence_pb2

# A router that has not read for long gets what has gathered in messages far below the size limit: an output takes at
# most some 200 bytes.
MAX_MESSAGE_OUTPUTS = 8192


class RouterLink:
    """Outputs and moves for one router, in messages. A message's moves come after its outputs, so one that has a move
    takes no more outputs."""

    def __init__(self) -> None:
        self._messages: deque[decode_pb2.DecodeResponse] = deque()
        self._ready = asyncio.Event()

    def put(self, output: sequence_pb2.SequenceOutput) -> None:
        """Send ``output`` with the next message."""
        last = self._messages[-1] if self._messages else None
        if last is None or last.moves or len(last.outputs) >= MAX_MESSAGE_OUTPUTS:
            self._append(decode_pb2.DecodeResponse(outputs=[output]))
        else:
            last.outputs.append(output)

    def put_move(self, move: decode_pb2.SequenceMove) -> None:
        """Send ``move`` after all that was put before it and before all that comes."""
        if self._messages:
            self._messages[-1].moves.append(move)
        else:
            self._append(decode_pb2.DecodeResponse(moves=[move]))

    async def take(self) -> decode_pb2.DecodeResponse:
        """Wait for something to send and return all of it, or the first of very much, in one message."""
        await self._ready.wait()
        message = self._messages.popleft()
        if not self._messages:
            self._ready.clear()
        return message

    def _append(self, message: decode_pb2.DecodeResponse) -> None:
        self._messages.append(message)
        self._ready.set()
