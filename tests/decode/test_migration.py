"""Sequences that move between real instances: every token is the reference's, and nothing is left anywhere."""

from __future__ import annotations

from starmesh.migration.source_record import SourceState
from starmesh.types import FinishReason, Ownership
from tests.decode.cluster import running_cluster
from tests.instance.running import spec


async def test_a_sequence_moves_and_its_tokens_do_not_change() -> None:
    async with running_cluster() as cluster:
        request = await cluster.router.start(spec(limit=150), "A")
        outcome = await cluster.migrate("a", "A", "B").outcome()
        assert outcome.state is SourceState.MOVED
        assert outcome.copied_blocks > 0 and outcome.transfer_bytes > 0 and outcome.frozen_s > 0
        assert await cluster.ledger.owner("a") == Ownership("B", 2)
        assert await request.ended() is FinishReason.LENGTH
        assert request.owner == Ownership("B", 2)
        assert request.stream.token_ids == request.reference
        assert (await cluster.decode["B"].instance.load()).migrated_sequences == 1
        await cluster.nothing_left()
