"""What is expected of an instance's sequences, and what follows for memory: who is preempted first, and who comes back.

Owns at how many tokens sequences are expected to end, and the rules that go by it. Owns no sequence, no block and no
change of either (``scheduler``). Where nothing is expected of any sequence there are no rules but rank and free blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Ordered

from starmesh.engine.sequence import Sequence


class ExpectedEnds:
    """``tokens`` says at how many tokens, prompt and output, requests are expected to end; of one that is missing
    nothing is known. It is kept, not copied."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens

    def preempted_first(self, running: Ordered[Sequence]) -> list[Sequence]:
        """``running``, ordered by rank, in the order in which they are to be preempted: of the lowest priority those
        that are expected to run longest, of equals the younger one; where nothing is known of any, the youngest.

        To free memory for long a preemption must hit what would stay long. What is about to end would be back at once,
        with all of its tokens to compute anew, and an answer that is long anyway spreads the wait over more tokens. One
        of which nothing is known may run to its limit. The one of highest rank comes last, however long it runs.
        """
        ends = {sequence: self._end(sequence) for sequence in running[:0:-1]}
        if all(end is None for end in ends.values()):
            return list(running[::-1])

        def first(sequence: Sequence) -> tuple[int, int]:
            end = ends[sequence]
            return (sequence.priority, sequence.tokens - (_limit(sequence) if end is None else end))

        # Sorting is stable: equals stay the youngest first.
        return [*sorted(ends, key=first), running[0]]

    def may_come_back(self, sequence: Sequence, running: Ordered[Sequence], *, blocks: int, block_tokens: int) -> bool:
        """Whether a preempted sequence fits beside those that run until each has come to its end, with ``blocks`` for
        all of them; otherwise it, or another, would soon be preempted again and computed anew.

        By the peak of their KV over time (``policy.peak``), each rounded up to its blocks. One of which nothing is
        known is taken to be half-way. True where nothing is known of any, and for one that outranks all that run: they
        end, and what comes after them is younger, so that it waits only for blocks then.
        """
        if not running or sequence.rank < running[0].rank:
            return True
        staying = [*running, sequence]
        ends = [self._end(each) for each in staying]
        if all(end is None for end in ends):
            return True
        remaining = [
            (each.output_tokens if end is None else end - each.tokens, each.tokens)
            for each, end in zip(staying, ends, strict=True)
        ]
        return _peak_blocks(remaining, block_tokens) <= blocks

    def _end(self, sequence: Sequence) -> int | None:
        """Not before the next token, and not beyond its limit."""
        expected = self._tokens.get(sequence.request_id)
        return None if expected is None else min(max(expected, sequence.tokens), _limit(sequence))


def _limit(sequence: Sequence) -> int:
    return sequence.prompt_tokens + sequence.sampling.max_output_tokens


def _peak_blocks(remaining: Iterable[tuple[int, int]], block_tokens: int) -> int:
    """The most blocks that sequences of (remaining tokens, tokens) may need together."""
    tokens = peak = 0
    for count, (left, held) in enumerate(sorted(remaining, reverse=True), start=1):
        tokens += held
        peak = max(peak, (tokens + count * (left + block_tokens - 1)) // block_tokens)
    return peak
