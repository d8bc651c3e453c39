"""A workload's requests one after the other: arrivals and lengths put together.

Owns how they are combined and cut. Lazy, and flat in memory however many there are. The same seed gives request n the
same lengths whatever the arrivals and the rate, and the same place among the arrivals whatever the lengths, so that
runs that differ in one thing differ by that thing only (common random numbers).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

import numpy as np

from starmesh.sim.workload.arrivals import draw_arrivals
from starmesh.sim.workload.lengths import LengthDraws
from starmesh.sim.workload.request import TRACE, SimulatedRequest, WorkloadConfig
from starmesh.sim.workload.trace import read_trace, trace_arrivals
from starmesh.sim.workload.trace_formats import TraceRow

CHUNK: Final = 1024
MOST_ID_CHARACTERS: Final = 64


def draw_requests(config: WorkloadConfig, *, seed: int) -> Iterator[SimulatedRequest]:
    """The requests of ``config`` in the order in which they arrive.

    Raises WorkloadError, while reading, for a trace that cannot be read.
    """
    timed = sized = _trace(config) if TRACE in (config.arrivals, config.lengths) else iter(())
    if config.arrivals == config.lengths == TRACE:
        timed, sized = itertools.tee(timed)  # read in step below: neither gets ahead of the other
    times = trace_arrivals(timed, config) if config.arrivals == TRACE else draw_arrivals(config, seed=seed)
    lengths = sized if config.lengths == TRACE else _drawn(config, seed)
    return (
        _request(number, arrives_s, row, config)
        for number, (arrives_s, row) in enumerate(itertools.islice(zip(times, lengths, strict=False), config.requests))
    )


def _trace(config: WorkloadConfig) -> Iterator[TraceRow]:
    assert config.trace_path is not None  # WorkloadConfig demands it
    return read_trace(config.trace_path, format_name=config.trace_format)


def _drawn(config: WorkloadConfig, seed: int) -> Iterator[TraceRow]:
    draws = LengthDraws(config.lengths, seed=seed)
    while True:
        prompts, outputs = (np.rint(values).astype(np.int64).tolist() for values in draws.draw(CHUNK))
        for prompt_tokens, output_tokens in zip(prompts, outputs, strict=True):
            yield TraceRow(0.0, prompt_tokens, output_tokens)


def _request(number: int, arrives_s: float, row: TraceRow, config: WorkloadConfig) -> SimulatedRequest:
    # The number keeps ids apart: a trace may name two requests alike.
    name = f"r{number:07d}" + (f"-{row.request_id[:MOST_ID_CHARACTERS]}" if row.request_id else "")
    limit = config.max_output_tokens
    if row.max_output_tokens is not None:
        limit = min(limit, row.max_output_tokens)
    return SimulatedRequest(
        request_id=name,
        arrives_s=arrives_s,
        prompt_tokens=max(1, min(row.prompt_tokens, config.max_prompt_tokens)),
        output_tokens=max(1, min(round(row.output_tokens * config.output_scale), limit)),
        max_output_tokens=limit,
    )
