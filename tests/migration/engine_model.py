"""An engine whose KV is the tokens that it was computed from.

A block that was pulled too early, from reused blocks, or into reused blocks shows as soon as a sequence decodes from
it. Calls wait in ``calls`` for their turn between two steps, and what comes of them in ``answers``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starmesh.types import SamplingParams, SequenceSpec
from tests.migration.wire_model import Output

BLOCK_TOKENS: Final = 2
TOTAL_BLOCKS: Final = 30


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


@dataclass(eq=False)
class Sequence:
    """A sequence in an engine. ``status`` is "running", "waiting" (preempted) or "held"."""

    request_id: str
    epoch: int
    token_ids: list[int]
    prompt_tokens: int
    max_output_tokens: int
    block_ids: list[int]
    resident_tokens: int
    status: str = "running"
    preemptions: int = 0

    @property
    def output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    def spec(self) -> SequenceSpec:
        return SequenceSpec(
            request_id=self.request_id,
            epoch=self.epoch,
            prompt_token_ids=tuple(self.token_ids[: self.prompt_tokens]),
            output_token_ids=tuple(self.token_ids[self.prompt_tokens :]),
            sampling=SamplingParams(max_output_tokens=self.max_output_tokens),
        )


class Engine:
    """Blocks and sequences of one instance."""

    def __init__(self, instance_id: str) -> None:
        self.id = instance_id
        self.free = list(range(TOTAL_BLOCKS))
        self.content: list[tuple[object, ...]] = [()] * TOTAL_BLOCKS
        self.sequences: dict[str, Sequence] = {}
        self.incoming: dict[str, tuple[int, list[int]]] = {}
        self.engine_calls: deque[Callable[[], None]] = deque()
        self.answers: deque[Callable[[], None]] = deque()

    def known_epoch(self, request_id: str) -> int:
        if request_id in self.sequences:
            return self.sequences[request_id].epoch
        return self.incoming[request_id][0] if request_id in self.incoming else 0

    def remove(self, request_id: str, epoch: int) -> None:
        if 0 < self.known_epoch(request_id) <= epoch:
            sequence = self.sequences.pop(request_id, None)
            self.free += sequence.block_ids if sequence else self.incoming.pop(request_id)[1]

    def allocate(self, blocks: int) -> list[int] | None:
        if blocks > len(self.free):
            return None
        taken, self.free = self.free[:blocks], self.free[blocks:]
        for block_id in taken:
            self.content[block_id] = ("fresh",)
        return taken

    def write_kv(self, sequence: Sequence, upto: int) -> None:
        for position in range(sequence.resident_tokens, upto):
            block_id = sequence.block_ids[position // BLOCK_TOKENS]
            kept = self.content[block_id][: position % BLOCK_TOKENS]
            self.content[block_id] = (*kept, (sequence.request_id, position, sequence.token_ids[position]))
        sequence.resident_tokens = upto

    def step(self, request_id: str) -> None:
        """One decode step of one sequence."""
        sequence = self.sequences[request_id]
        if blocks_for(len(sequence.token_ids)) > len(sequence.block_ids):
            block = self.allocate(1)
            if block is None:
                self.preempt(request_id)
                return
            sequence.block_ids += block
        self.write_kv(sequence, len(sequence.token_ids))
        for position, token_id in enumerate(sequence.token_ids):
            block = self.content[sequence.block_ids[position // BLOCK_TOKENS]]
            expected = (request_id, position, token_id)
            slot = position % BLOCK_TOKENS
            assert slot < len(block) and block[slot] == expected, f"KV of {request_id} at {self.id}: {block}"
        token_id = sequence.output_tokens
        output = Output(
            request_id,
            sequence.epoch,
            sequence.output_tokens,
            (token_id,),
            finished=sequence.output_tokens + 1 >= sequence.max_output_tokens,
        )
        sequence.token_ids.append(token_id)
        if output.finished:
            self.remove(request_id, sequence.epoch)
        self.answers.append(lambda: self.deliver(output))

    def preempt(self, request_id: str) -> None:
        sequence = self.sequences[request_id]
        self.free += sequence.block_ids
        sequence.block_ids, sequence.resident_tokens = [], 0
        sequence.preemptions += 1
        sequence.status = "waiting"

    def readmit(self, request_id: str) -> None:
        sequence = self.sequences[request_id]
        block_ids = self.allocate(blocks_for(len(sequence.token_ids)))
        if block_ids is not None:
            sequence.block_ids = block_ids
            sequence.status = "running"
            self.write_kv(sequence, len(sequence.token_ids) - 1)

    def deliver(self, output: Output) -> None:
        """Take what a step made; the worker does."""
        raise NotImplementedError
