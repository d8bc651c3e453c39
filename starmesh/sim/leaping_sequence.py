"""Sequences that make steps together without being told one by one: what a leap of an instance costs no more than.

Owns how far a sequence of an instance is, when it is looked at. While sequences decode, each step does the same to all
that run: a token more, one more computed, and now and then a block. So an instance counts those steps once
(``SharedSteps``), and a running sequence makes up for them when somebody reads it. The scheduler does not see the
difference.
"""

from __future__ import annotations

from collections.abc import Callable, MutableSequence

from starmesh.engine.block_pool import BlockPool, IntegrityError
from starmesh.engine.sequence import Sequence, SequenceStatus
from starmesh.sim.token_count import TokenCount, counted_spec
from starmesh.types import SequenceSpec


class OwingPool(BlockPool):
    """A block pool that may owe blocks: they count as taken, and are handed out when their holder looks for them."""

    def __init__(self, total_blocks: int, *, block_tokens: int) -> None:
        super().__init__(total_blocks, block_tokens=block_tokens)
        self._owed_blocks = 0

    def __repr__(self) -> str:
        return f"<OwingPool free={self.free_blocks} of {self.total_blocks}, {self._owed_blocks} owed>"

    @property
    def free_blocks(self) -> int:
        return super().free_blocks - self._owed_blocks

    def owe(self, blocks: int) -> None:
        """Count ``blocks`` more as taken. Raises IntegrityError for more than are free."""
        self._owed_blocks += blocks
        if self.free_blocks < 0:
            raise IntegrityError(f"{self!r} owes {self._owed_blocks} blocks")

    def settle(self, blocks: int) -> list[int]:
        """Hand out ``blocks`` of those owed."""
        self._owed_blocks -= blocks
        return self.allocate(blocks)


class SharedSteps:
    """How many steps all running sequences of an instance have made together, on blocks that ``pool`` owes them.

    ``ends_at`` says at how many tokens, prompt included, a sequence ends, if it ends there."""

    def __init__(self, pool: OwingPool, *, ends_at: Callable[[SequenceSpec], int]) -> None:
        self.made = 0
        self.pool = pool
        self._ends_at = ends_at

    def sequence(self, spec: SequenceSpec, *, arrival: int, queued_at_s: float, hold: bool = False) -> LeapingSequence:
        """A new sequence that waits, as ``Sequence.from_spec``."""
        return LeapingSequence(spec, self, self._ends_at(spec), arrival=arrival, queued_at_s=queued_at_s, hold=hold)


class LeapingSequence(Sequence):
    """A sequence whose progress is ``SharedSteps``' while it runs. Its tokens are counted, not kept."""

    __slots__ = ("_block_ids", "_computed_tokens", "_seen_steps", "_shared", "_status", "_token_count", "ends_at")

    def __init__(
        self, spec: SequenceSpec, shared: SharedSteps, ends_at: int, *, arrival: int, queued_at_s: float, hold: bool
    ) -> None:
        self.ends_at = ends_at
        self._shared = shared
        self._seen_steps = 0
        self._status = SequenceStatus.WAITING
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

    def _catch_up(self) -> None:
        made = self._shared.made
        if self._status is SequenceStatus.RUNNING and made != self._seen_steps:
            self._token_count.length += made - self._seen_steps
            self._computed_tokens += made - self._seen_steps
            self._seen_steps = made

    @property
    def status(self) -> SequenceStatus:
        return self._status

    @status.setter
    def status(self, status: SequenceStatus) -> None:
        # What it holds when it leaves the batch is what it had then; what it joins is counted from now on.
        self._settle_blocks()
        self._status = status
        self._seen_steps = self._shared.made

    @property
    def token_ids(self) -> MutableSequence[int]:
        self._catch_up()
        return self._token_count

    @token_ids.setter
    def token_ids(self, token_ids: MutableSequence[int]) -> None:
        self._token_count = TokenCount(len(token_ids))

    @property
    def computed_tokens(self) -> int:
        self._catch_up()
        return self._computed_tokens

    @computed_tokens.setter
    def computed_tokens(self, computed_tokens: int) -> None:
        self._catch_up()
        self._computed_tokens = computed_tokens

    @property
    def block_ids(self) -> list[int]:
        self._settle_blocks()
        return self._block_ids

    @block_ids.setter
    def block_ids(self, block_ids: list[int]) -> None:
        self._block_ids = block_ids

    def _settle_blocks(self) -> None:
        self._catch_up()
        missing = self._shared.pool.blocks_for(self._computed_tokens) - len(self._block_ids)
        if missing > 0:
            self._block_ids += self._shared.pool.settle(missing)

    @property
    def steps_left(self) -> int:
        """Steps until it ends, the one in which it does included; at least 1."""
        return max(1, self.ends_at - self.tokens)

    @property
    def room_tokens(self) -> int:
        """Tokens more that the blocks hold which it has or is owed."""
        self._catch_up()
        bare = len(self._block_ids) * self._shared.pool.block_tokens - self._computed_tokens
        return bare if bare >= 0 else bare % self._shared.pool.block_tokens

    @property
    def tokens(self) -> int:
        self._catch_up()
        return self._token_count.length

    @property
    def output_tokens(self) -> int:
        return self.tokens - self.prompt_tokens

    @property
    def uncomputed_tokens(self) -> int:
        # A step shared makes no difference to it.
        return self._token_count.length - self._computed_tokens

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
