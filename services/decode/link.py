"""One router's side of a Decode stream: what waits to be sent to it.

A step adds to the link with a plain call; the stream's writer takes all that has gathered. What waits is bounded by
the sequences that the instance takes and the tokens that each may generate.
"""

from __future__ import annotations

import asyncio

from starmesh.v1 import decode_pb2, sequence_pb2

# A router that has not read for long gets what has gathered in messages far below the size limit: an output takes at
# most some 200 bytes.
MAX_MESSAGE_OUTPUTS = 8192


class RouterLink:
    """Outputs for one router."""

    def __init__(self) -> None:
        self._outputs: list[sequence_pb2.SequenceOutput] = []
        self._ready = asyncio.Event()

    def put(self, output: sequence_pb2.SequenceOutput) -> None:
        """Send ``output`` with the next message."""
        self._outputs.append(output)
        self._ready.set()

    async def take(self) -> decode_pb2.DecodeResponse:
        """Wait for outputs and return all, or the first of very many, in one message."""
        await self._ready.wait()
        outputs, self._outputs = self._outputs[:MAX_MESSAGE_OUTPUTS], self._outputs[MAX_MESSAGE_OUTPUTS:]
        if not self._outputs:
            self._ready.clear()
        return decode_pb2.DecodeResponse(outputs=outputs)
