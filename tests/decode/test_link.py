"""What waits for a router: all of it in one message, unless it is too much for one, and in order."""

from __future__ import annotations

import pytest

from services.decode import link as link_module
from services.decode.link import RouterLink
from starmesh.v1 import decode_pb2, sequence_pb2


async def test_a_router_that_has_not_read_for_long_gets_bounded_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_MESSAGE_OUTPUTS", 3)
    link = RouterLink()
    for offset in range(7):
        link.put(sequence_pb2.SequenceOutput(request_id="a", offset=offset))
    messages = [await link.take() for _ in range(3)]
    assert [[output.offset for output in message.outputs] for message in messages] == [[0, 1, 2], [3, 4, 5], [6]]


async def test_a_move_comes_after_all_outputs_before_it_and_before_all_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within a message moves come last."""
    monkeypatch.setattr(link_module, "MAX_MESSAGE_OUTPUTS", 2)
    link = RouterLink()
    for what in "aAbcdBCef":
        if what.isupper():
            link.put_move(decode_pb2.SequenceMove(request_id=what))
        else:
            link.put(sequence_pb2.SequenceOutput(request_id=what))
    told = []
    for _ in range(4):
        message = await link.take()
        told.append("".join(item.request_id for item in [*message.outputs, *message.moves]))
    assert told == ["aA", "bc", "dBC", "ef"]
    link.put_move(decode_pb2.SequenceMove(request_id="D"))
    assert [move.request_id for move in (await link.take()).moves] == ["D"]
