"""Sequences that make steps together without being told one by one: why a leap of an instance costs so little.

Owns how far a sequence of an instance is. While sequences decode, each step does the same to all that run: a token
more, one more computed, and now and then a block. So an instance counts those steps once (``SharedSteps``), and a
running sequence knows only by how much it differs from that count. Blocks are owed to it until somebody looks at them.
The scheduler does not see the difference.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence
from collections.abc import Sequence as Items
from functools import lru_cache

from starmesh.engine.block_pool import BlockPool, IntegrityError
from starmesh.engine.sequence import Sequence, SequenceStatus
from starmesh.sim.token_count import TokenCount, counted_spec
from starmesh.types import SequenceSpec


class OwingPool(BlockPool):
    """A block pool that may owe blocks: they count as taken, and are handed out when their holder looks for them.

    ``freed`` counts the block tables that were given up.
    """

    def __init__(self, total_blocks: int, *, block_tokens: int) -> None:
        super().__init__(total_blocks, block_tokens=block_tokens)
        self._free = list(_free_ids(total_blocks))
        self._owed_blocks = 0
        self.freed = 0

    def __repr__(self) -> str:
        return f"<OwingPool free={self.free_blocks} of {self.total_blocks}, {self._owed_blocks} owed>"

    @property
    def free_blocks(self) -> int:
        return super().free_blocks - self._owed_blocks

    def free(self, block_ids: Items[int]) -> None:
        self.freed += 1
        super().free(block_ids)

    def owe(self, blocks: int) -> None:
        """Count ``blocks`` more as taken, or fewer. Raises IntegrityError for more than are free."""
        self._owed_blocks += blocks
        if self.free_blocks < 0:
            raise IntegrityError(f"{self!r} owes blocks that it does not have")

    def settle(self, blocks: int) -> list[int]:
        """Hand out ``blocks`` of those owed."""
        self._owed_blocks -= blocks
        return self.allocate(blocks)


@lru_cache(maxsize=4)
def _free_ids(total_blocks: int) -> tuple[int, ...]:
    # The numbers of millions of blocks are kept once for all instances.
    return tuple(range(total_blocks - 1, -1, -1))


class _Still:
    """The pace of a sequence that does not run."""

    made = 0


_STILL = _Still()


class SharedSteps:
    """How many steps all running sequences of an instance have made together, on blocks that ``pool`` owes them.

    ``ends_at`` says at how many tokens, prompt included, a sequence ends, if it ends there.
    """

    def __init__(self, pool: OwingPool, *, ends_at: Callable[[SequenceSpec], int]) -> None:
        self.made = 0
        self.pool = pool
        self.changes = 0
        self._ends_at = ends_at

    @property
    def version(self) -> tuple[int, int]:
        """Differs once anything about the instance's sequences has changed but by shared steps."""
        return (self.changes, self.pool.freed)

    def sequence(self, spec: SequenceSpec, *, arrival: int, queued_at_s: float, hold: bool = False) -> LeapingSequence:
        """A new sequence that waits, as ``Sequence.from_spec``."""
        return LeapingSequence(spec, self, self._ends_at(spec), arrival=arrival, queued_at_s=queued_at_s, hold=hold)


class LeapingSequence(Sequence):
    """A sequence whose progress is ``SharedSteps``' while it runs. Its tokens are counted, not kept."""

    __slots__ = ("_block_ids", "_computed_tokens", "_ends_at", "_pace", "_shared", "_status", "_tokens")

    def __init__(
        self, spec: SequenceSpec, shared: SharedSteps, ends_at: int, *, arrival: int, queued_at_s: float, hold: bool
    ) -> None:
        self._ends_at = ends_at
        self._shared = shared
        self._pace: SharedSteps | _Still = _STILL
        self._status = SequenceStatus.WAITING
        # Both less the steps that its pace has made.
        self._tokens = spec.tokens
        self._computed_tokens = 0
        self._block_ids: list[int] = []
        super().__init__(
            request_id=spec.request_id,
            epoch=spec.epoch,
            priority=spec.priority,
            sampling=spec.sampling,
            prompt_tokens=len(spec.prompt_token_ids),
            token_ids=TokenCount(spec.tokens),
            arrival=arrival,
            hold=hold,
            queued_at_s=queued_at_s,
        )

    @property
    def status(self) -> SequenceStatus:
        return self._status

    @status.setter
    def status(self, status: SequenceStatus) -> None:
        # What it holds when it leaves the batch is what it had then; from when it joins, it goes with the others.
        self._settle_blocks()
        made, self._pace = self._pace.made, self._shared if status is SequenceStatus.RUNNING else _STILL
        self._tokens += made - self._pace.made
        self._computed_tokens += made - self._pace.made
        self._status = status
        self._shared.changes += 1

    @property
    def token_ids(self) -> MutableSequence[int]:
        return _Tokens(self)

    @token_ids.setter
    def token_ids(self, token_ids: MutableSequence[int]) -> None:
        self._tokens = len(token_ids) - self._pace.made
        self._shared.changes += 1

    @property
    def computed_tokens(self) -> int:
        return self._computed_tokens + self._pace.made

    @computed_tokens.setter
    def computed_tokens(self, computed_tokens: int) -> None:
        self._computed_tokens = computed_tokens - self._pace.made
        self._shared.changes += 1

    @property
    def block_ids(self) -> list[int]:
        self._settle_blocks()
        return self._block_ids

    @block_ids.setter
    def block_ids(self, block_ids: list[int]) -> None:
        self._block_ids = block_ids
        self._shared.changes += 1

    @property
    def tokens(self) -> int:
        return self._tokens + self._pace.made

    @property
    def output_tokens(self) -> int:
        return self._tokens + self._pace.made - self.prompt_tokens

    @property
    def uncomputed_tokens(self) -> int:
        return self._tokens - self._computed_tokens

    def course(self) -> tuple[int, int, int]:
        """Of a running one, as it goes on with the others: how many shared steps are made when it ends, how many when
        its block table as it is holds no token more, and its tokens less the shared steps made."""
        full_made = len(self._block_ids) * self._shared.pool.block_tokens - self._computed_tokens
        return (self._ends_at - self._tokens, full_made, self._tokens)

    def row(self) -> tuple[int, int, int, int, int, int]:
        """Epoch, prompt, output, resident and most output tokens as in a load, the third and fourth less the shared
        steps made for one that runs; and whether it does."""
        return (
            self.epoch,
            self.prompt_tokens,
            self._tokens - self.prompt_tokens,
            self._computed_tokens,
            self.sampling.max_output_tokens,
            self._status is SequenceStatus.RUNNING,
        )

    def waive_owed_blocks(self) -> None:
        """It is about to end: have no blocks handed out only to be given back. The KV in them is gone with that."""
        owed = self._shared.pool.blocks_for(self.computed_tokens) - len(self._block_ids)
        if owed > 0:
            self._shared.pool.owe(-owed)
            self.computed_tokens = len(self._block_ids) * self._shared.pool.block_tokens

    def spec(self) -> SequenceSpec:
        """As ``Sequence.spec``, with counts for tokens."""
        return counted_spec(
            self.request_id,
            self.epoch,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            sampling=self.sampling,
            priority=self.priority,
        )

    def _settle_blocks(self) -> None:
        missing = self._shared.pool.blocks_for(self.computed_tokens) - len(self._block_ids)
        if missing > 0:
            self._block_ids += self._shared.pool.settle(missing)


class _Tokens(TokenCount):
    """The tokens of a sequence as it goes on."""

    __slots__ = ("_sequence",)

    def __init__(self, sequence: LeapingSequence) -> None:
        self._sequence = sequence

    @property
    def length(self) -> int:
        return self._sequence.tokens

    @length.setter
    def length(self, length: int) -> None:
        self._sequence.token_ids = TokenCount(length)
