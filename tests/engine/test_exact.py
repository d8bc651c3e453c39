"""Greedy decoding in fp32 gives, token for token, what ``generate()`` of transformers gives on each prompt alone.

32 prompts run on two engines together, with everything that may disturb them: staggered arrivals, prompts in chunks
between decodes, a pool so small that sequences are preempted and recomputed, sequences handed over after their first
token and others moved in the middle of decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from transformers import AutoTokenizer

from starmesh.clock import WallClock
from starmesh.engine.engine import EngineConfig, EngineCore, SequenceOutput, StopChecker
from starmesh.engine.model import TorchExecutor
from starmesh.model_files import fetch_model
from starmesh.types import SamplingParams, SequenceSpec
from tests.prompts import prompt_token_ids
from tests.reference import Reference

OUTPUT_TOKENS = (48, 12, 24, 40, 16, 32)


@dataclass
class Request:
    """A prompt, what has come of it, and what is to happen to it."""

    spec: SequenceSpec
    engine: int
    hold: bool
    move_at: int | None  # output tokens after which it is moved to the other engine
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False


def no_stop_strings(spec: SequenceSpec) -> StopChecker:
    raise AssertionError("no sequence here has stop strings")


class Cluster:
    """Two engines, and the driver's view of what they run."""

    def __init__(self, model_dir: Any, *, total_blocks: tuple[int, int]) -> None:
        self.executors = [TorchExecutor.load(model_dir, total_blocks=blocks, threads=1) for blocks in total_blocks]
        self.cores = [
            EngineCore(
                executor,
                EngineConfig(
                    eos_token_ids=frozenset(executor.eos_token_ids),
                    max_sequence_tokens=executor.context_tokens,
                    max_step_tokens=48,
                    max_sequences=10,
                    prefix_caching=prefix_caching,
                ),
                stop_checker=no_stop_strings,
                clock=WallClock(),
            )
            for executor, prefix_caching in zip(self.executors, (True, False), strict=True)
        ]
        self.requests: dict[str, Request] = {}
        self.moves = 0

    def add(self, request: Request) -> None:
        self.requests[request.spec.request_id] = request
        self.cores[request.engine].add(request.spec, hold=request.hold)

    def step(self) -> None:
        for core in self.cores:
            self._take(core.step())
            core.check_integrity()
        for request in self.requests.values():
            due = request.hold or (request.move_at is not None and len(request.token_ids) >= request.move_at)
            if due and request.token_ids and not request.finished:
                self._move(request)

    def _take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            request = self.requests[output.request_id]
            assert output.error is None
            assert (output.epoch, output.offset) == (request.spec.epoch, len(request.token_ids))
            request.token_ids += output.token_ids
            request.finished = output.finish_reason is not None

    def _move(self, request: Request) -> None:
        source, target = self.cores[request.engine], self.cores[1 - request.engine]
        request_id, epoch = request.spec.request_id, request.spec.epoch + 1
        if not any(each.request_id == request_id and each.resident_tokens for each in source.load().sequences):
            return  # preempted: it has no blocks to move
        block_ids = target.reserve(request_id, epoch, request.spec.tokens + len(request.token_ids))
        if block_ids is None:
            return
        if request.hold:
            source_block_ids, resident_tokens = source.held(request_id)
        else:
            exported = source.export(request_id)
            source_block_ids, resident_tokens = exported.block_ids, exported.resident_tokens
            assert list(exported.spec.output_token_ids) == request.token_ids
        source_memory, target_memory = (self.executors[at].memory for at in (request.engine, 1 - request.engine))
        for source_block_id, block_id in zip(source_block_ids, block_ids, strict=False):
            target_memory.write_block(block_id, 0, bytes(source_memory.read_block(source_block_id)))
        assert source.release(request_id)
        moved = replace(request.spec, epoch=epoch, output_token_ids=tuple(request.token_ids))
        target.start(moved, resident_tokens)
        request.spec = replace(request.spec, epoch=epoch)
        request.engine, request.hold, request.move_at = 1 - request.engine, False, None
        self.moves += 1


def make_requests(tokenizer: Any) -> list[Request]:
    return [
        Request(
            spec=SequenceSpec(
                request_id=f"r{number:02}",
                epoch=1,
                prompt_token_ids=tuple(prompt),
                output_token_ids=(),
                sampling=SamplingParams(max_output_tokens=OUTPUT_TOKENS[number % len(OUTPUT_TOKENS)], temperature=0.0),
            ),
            engine=int(number % 4 == 3),
            hold=number % 5 == 4,
            move_at=7 if number % 5 == 1 else None,
        )
        for number, prompt in enumerate(prompt_token_ids(tokenizer))
    ]


@pytest.mark.timeout(900)
def test_32_prompts_together_give_the_tokens_that_each_gives_alone() -> None:
    model_dir = fetch_model()
    cluster = Cluster(model_dir, total_blocks=(22, 28))
    requests = make_requests(AutoTokenizer.from_pretrained(model_dir))
    prompt_tokens = [len(request.spec.prompt_token_ids) for request in requests]
    assert (min(prompt_tokens) < 8, max(prompt_tokens) > 180) == (True, True)
    arrivals = list(requests)
    steps = 0
    while arrivals or not all(core.idle for core in cluster.cores) or not all(each.finished for each in requests):
        if arrivals:
            cluster.add(arrivals.pop(0))
        cluster.step()
        steps += 1
        assert steps < 2000, [repr(core) for core in cluster.cores]
    loads = [core.load() for core in cluster.cores]
    assert all(load.free_blocks == load.total_blocks for load in loads)
    preemptions = sum(load.preemptions for load in loads)
    assert preemptions > 0
    assert cluster.moves >= 8
    reference = Reference(model_dir)
    near_ties = sum(
        reference.near_ties(
            request.spec.request_id,
            request.spec.prompt_token_ids,
            request.token_ids,
            max_output_tokens=request.spec.sampling.max_output_tokens,
        )
        for request in requests
    )
    print(
        f"exact: {len(requests)} prompts, {sum(prompt_tokens)} prompt and {sum(load.output_tokens for load in loads)} "
        f"output tokens, {steps} steps, {preemptions} preemptions, {cluster.moves} moves, {near_ties} near ties"
    )
