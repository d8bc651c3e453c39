"""What waits for a router: all of it in one message, unless it is too much for one."""

from __future__ import annotations

import pytest

from services.decode import link as link_module
from services.decode.link import RouterLink
from starmesh.v1 import sequence_pb2


async def test_a_router_that_has_not_read_for_long_gets_bounded_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_MESSAGE_OUTPUTS", 3)
    link = RouterLink()
    for offset in range(7):
        link.put(sequence_pb2.SequenceOutput(request_id="a", offset=offset))
    messages = [await link.take() for _ in range(3)]
    assert [[output.offset for output in message.outputs] for message in messages] == [[0, 1, 2], [3, 4, 5], [6]]
