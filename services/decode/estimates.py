"""What an estimate says after more tokens, and which estimates are worth having. Pure.

Between two answers of the predictor a sequence gets one token nearer to its end with each that it generates, and the
estimate one token older; nothing else is made of it here.
"""

from __future__ import annotations

from dataclasses import replace

from starmesh.types import RemainingEstimate, SequenceLoad


def is_sound(estimate: RemainingEstimate, *, output_tokens: int) -> bool:
    """Whether it can be one of a sequence that has generated ``output_tokens``: what a peer sent may be anything."""
    return (
        0 <= estimate.output_tokens <= output_tokens
        and 0 <= estimate.remaining_tokens <= estimate.remaining_tokens_upper
    )


def newer(known: RemainingEstimate | None, found: RemainingEstimate) -> RemainingEstimate:
    """The one of the later position; ``found`` of two of the same."""
    return known if known is not None and known.output_tokens > found.output_tokens else found


def aged(load: SequenceLoad, estimate: RemainingEstimate) -> SequenceLoad:
    """``load`` with what ``estimate`` says as of now: less the tokens since, at least 0."""
    age = max(0, load.output_tokens - estimate.output_tokens)
    return replace(
        load,
        remaining_tokens=max(0, estimate.remaining_tokens - age),
        remaining_tokens_upper=max(0, estimate.remaining_tokens_upper - age),
        prediction_age_tokens=age,
    )


def to_limit(load: SequenceLoad, *, max_sequence_tokens: int) -> SequenceLoad:
    """``load`` of a sequence that only a limit ends, its own or the instance's: that is known, not predicted."""
    room = max_sequence_tokens - load.prompt_tokens - load.output_tokens
    remaining = max(0, min(load.max_output_tokens - load.output_tokens, room))
    return replace(load, remaining_tokens=remaining, remaining_tokens_upper=remaining, prediction_age_tokens=0)
