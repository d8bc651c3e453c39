"""What became of a request. Owns the record; what is counted over all of them is ``measurements``'."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class RequestOutcome:
    """Filled in while the request is served. ``output_tokens`` are those that it got; with ``cut`` it would have got
    more, but for the length of the context or of what a decode instance's memory holds. ``finished_s`` is None for one
    that was turned away or given up, which ``refused`` tells apart. ``longest_gap_s`` is the longest time between two
    of its tokens."""

    request_id: str
    arrived_s: float
    prompt_tokens: int
    output_tokens: int = 0
    placed_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    longest_gap_s: float = 0.0
    migrations: int = 0
    preemptions: int = 0
    recoveries: int = 0
    refused: bool = False
    cut: bool = False

    @property
    def ttft_s(self) -> float:
        """Arrival to first token; infinite without one."""
        return float("inf") if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float:
        """(end-to-end - TTFT) / (output tokens - 1); 0 for an output of one token, infinite for an unfinished one."""
        if self.first_token_s is None or self.finished_s is None:
            return float("inf")
        return (self.finished_s - self.first_token_s) / max(1, self.output_tokens - 1)
