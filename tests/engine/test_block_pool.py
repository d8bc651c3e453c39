"""The block pool against a model that keeps, for each holder, the content it believes its blocks to have."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from starmesh.engine.block_pool import BlockPool, IntegrityError, OutOfBlocks, block_digest

pytestmark = pytest.mark.fast

TOTAL_BLOCKS = 6
DIGESTS = [block_digest(b"", [number]) for number in range(4)]


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(TOTAL_BLOCKS, block_tokens=4)
        self.tables: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # what was published into a block that has not been reallocated since

    @rule(count=st.integers(0, TOTAL_BLOCKS + 1))
    def allocate(self, count: int) -> None:
        free = self.pool.free_blocks
        if count > free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            assert self.pool.free_blocks == free
            return
        block_ids = self.pool.allocate(count)
        held = {block_id for table in self.tables for block_id in table}
        assert len(set(block_ids)) == count
        assert not held & set(block_ids)
        for block_id in block_ids:
            self.content.pop(block_id, None)
        self.tables.append(block_ids)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), digest=st.sampled_from(DIGESTS))
    def publish(self, data: st.DataObject, digest: bytes) -> None:
        block_id = data.draw(st.sampled_from([block_id for table in self.tables for block_id in table]))
        # A block's content is fixed, so one that has been published can only be published as the same again.
        self.pool.publish(block_id, self.content.setdefault(block_id, digest))

    @rule(digests=st.lists(st.sampled_from(DIGESTS), unique=True))
    def acquire(self, digests: list[bytes]) -> None:
        block_ids = self.pool.acquire_prefix(digests)
        assert [self.content[block_id] for block_id in block_ids] == digests[: len(block_ids)]
        self.tables.append(block_ids)

    @invariant()
    def balanced(self) -> None:
        self.pool.check_integrity(self.tables)
        held = {block_id for table in self.tables for block_id in table}
        assert self.pool.free_blocks == TOTAL_BLOCKS - len(held)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_cached_block_is_evicted_first_and_free_ones_before_any() -> None:
    pool = BlockPool(3, block_tokens=1)
    for number in range(2):
        table = pool.allocate(1)
        pool.publish(table[0], DIGESTS[number])
        pool.free(table)
    assert pool.acquire_prefix([DIGESTS[0]]) == [0]
    pool.free([0])  # now the other one was used longest ago
    held = pool.allocate(2)
    assert held == [2, 1]
    assert pool.acquire_prefix([DIGESTS[1]]) == []
    assert pool.acquire_prefix([DIGESTS[0]]) == [0]


def test_the_end_of_a_freed_sequence_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(2, block_tokens=1)
    table = pool.allocate(2)
    for block_id, digest in zip(table, DIGESTS, strict=False):
        pool.publish(block_id, digest)
    pool.free(table)
    assert pool.allocate(1) == [table[1]]
    assert pool.acquire_prefix(DIGESTS[:2]) == [table[0]]


def test_a_digest_covers_all_tokens_before_it_and_their_boundaries() -> None:
    first = block_digest(b"", [1, 2])
    assert block_digest(first, [3]) != block_digest(block_digest(b"", [1]), [3])
    assert block_digest(b"", [1, 2]) != block_digest(b"", [2, 1])
    assert block_digest(b"", [-1]) != block_digest(b"", [255])
    assert block_digest(first, [3]) == block_digest(first, [3])


@pytest.mark.parametrize(
    "tables", [[], [[0]], [[0, 1], [1]], [[0, 2]]], ids=["leak", "lost block", "uncounted reference", "other block"]
)
def test_integrity_notices(tables: list[list[int]]) -> None:
    pool = BlockPool(3, block_tokens=1)
    pool.allocate(2)
    pool.check_integrity([[0, 1]])
    with pytest.raises(IntegrityError):
        pool.check_integrity(tables)


def test_freeing_twice_or_publishing_a_free_block_is_a_bug() -> None:
    pool = BlockPool(1, block_tokens=1)
    pool.free(pool.allocate(1))
    with pytest.raises(IntegrityError, match="freed twice"):
        pool.free([0])
    with pytest.raises(IntegrityError, match="nobody holds"):
        pool.publish(0, DIGESTS[0])


def test_a_pool_needs_blocks() -> None:
    with pytest.raises(ValueError, match="needs blocks"):
        BlockPool(0, block_tokens=16)
