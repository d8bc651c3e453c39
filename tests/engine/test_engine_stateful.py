"""Two engines under random work, with everything that can happen to a sequence, on pools that are far too small.

Whatever happens, the tokens of each request, put together as a router does it, are the beginning of what it gets when
it runs alone and undisturbed; and when disturbances end, every request ends with all of them and every block is free.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from starmesh.clock import VirtualClock
from starmesh.engine.engine import EngineConfig, EngineCore, SequenceOutput
from starmesh.engine.scheduler import DuplicateRequest, QueueFull, UnknownRequest
from starmesh.types import FinishReason, SamplingParams, SequenceSpec
from tests.engine.checking_executor import EOS, CheckingExecutor, reference_tokens
from tests.engine.test_engine import StopAtToken

TOTAL_BLOCKS = 7
BLOCK_TOKENS = 3
MAX_SEQUENCE_TOKENS = TOTAL_BLOCKS * BLOCK_TOKENS - 2
MAX_STEP_TOKENS = 6


@dataclass
class Request:
    """What a router would know of a request."""

    spec: SequenceSpec
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    at: int | None = None  # the engine that has it; None: it has to be added anew somewhere

    def __post_init__(self) -> None:
        tokens = reference_tokens(self.spec.prompt_token_ids, self.spec.sampling.max_output_tokens)
        tokens = tokens[: MAX_SEQUENCE_TOKENS - len(self.spec.prompt_token_ids)]
        sampling = self.spec.sampling
        stops = {int(text) for text in sampling.stop_strings} | (set() if sampling.ignore_eos else {EOS})
        self.expected_reason = FinishReason.LENGTH
        for offset, token_id in enumerate(tokens):
            if token_id in stops:
                tokens = tokens[: offset + 1]
                self.expected_reason = FinishReason.STOP
                break
        self.expected = tokens

    def next_spec(self) -> SequenceSpec:
        self.spec = replace(self.spec, epoch=self.spec.epoch + 1, output_token_ids=tuple(self.token_ids))
        return self.spec


@dataclass
class Transfer:
    """Blocks held at ``source`` that ``target`` has reserved room for."""

    request: Request
    source: int
    target: int
    source_block_ids: tuple[int, ...]
    target_block_ids: tuple[int, ...]
    resident_tokens: int


requests = st.builds(
    lambda prefix, tail, outputs, eos, stop, priority: SequenceSpec(
        request_id="",
        epoch=1,
        prompt_token_ids=((1, 2, 3, 4, 5, 6, 7)[:prefix] + tuple(tail)),
        output_token_ids=(),
        sampling=SamplingParams(
            max_output_tokens=outputs,
            temperature=0.0,
            ignore_eos=not eos,
            stop_strings=(str(stop),) if stop is not None else (),
        ),
        priority=priority,
    ),
    st.integers(0, 7),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 14),
    st.booleans(),
    st.none() | st.integers(0, 22),
    st.integers(-1, 1),
)
engines = st.integers(0, 1)


class EnginesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.executors = [CheckingExecutor(TOTAL_BLOCKS, BLOCK_TOKENS, MAX_STEP_TOKENS) for _ in range(2)]
        self.cores = [
            EngineCore(
                executor,
                EngineConfig(
                    eos_token_ids=frozenset({EOS}),
                    max_sequence_tokens=MAX_SEQUENCE_TOKENS,
                    max_step_tokens=MAX_STEP_TOKENS,
                    max_sequences=4,
                    max_waiting_sequences=4,
                    prefix_caching=prefix_caching,
                    watermark=0.15,
                ),
                stop_checker=StopAtToken,
                clock=VirtualClock(),
            )
            for executor, prefix_caching in zip(self.executors, (True, False), strict=True)
        ]
        self.requests: dict[str, Request] = {}
        self.held: dict[str, int] = {}  # what each engine should hold, by request
        self.transfers: list[Transfer] = []
        self.holding: set[str] = set()  # to be held after their next token
        self.cancelled: list[Request] = []

    # What clients and routers do

    @rule(at=engines, spec=requests, hold=st.booleans())
    def submit(self, at: int, spec: SequenceSpec, hold: bool) -> None:
        request = Request(replace(spec, request_id=f"r{len(self.requests) + len(self.cancelled)}"))
        self.requests[request.spec.request_id] = request
        self._add(request, request.spec, at, hold)

    @precondition(lambda self: self._at(None))
    @rule(at=engines, hold=st.booleans(), data=st.data())
    def recover(self, at: int, hold: bool, data: st.DataObject) -> None:
        """Recompute a request that was given up, from its prompt and the tokens it has."""
        request = data.draw(st.sampled_from(self._at(None)))
        self._add(request, request.next_spec(), at, hold)

    @precondition(lambda self: self._at(0, 1))
    @rule(hold=st.booleans(), data=st.data())
    def replace_older_epoch(self, hold: bool, data: st.DataObject) -> None:
        """A router that lost touch with an instance sends the request to the same one again."""
        request = data.draw(st.sampled_from(self._at(0, 1)))
        at = request.at
        assert at is not None
        with pytest.raises(DuplicateRequest):
            self.cores[at].add(request.spec)
        self._add(request, request.next_spec(), at, hold)

    @precondition(lambda self: self._at(0, 1))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self._at(0, 1)))
        assert request.at is not None
        assert not self.cores[request.at].cancel(request.spec.request_id, epoch=request.spec.epoch - 1)
        assert self.cores[request.at].cancel(request.spec.request_id, epoch=request.spec.epoch)
        self._lose(request)
        self.cancelled.append(self.requests.pop(request.spec.request_id))

    # What instances do

    @rule(at=engines, steps=st.integers(1, 4))
    def step(self, at: int, steps: int) -> None:
        for _ in range(steps):
            self._take(at, self.cores[at].step())
            self.cores[at].check_integrity()

    @rule(at=engines, expected=st.dictionaries(st.sampled_from([f"r{at}" for at in range(6)]), st.integers(0, 30)))
    def expect(self, at: int, expected: dict[str, int]) -> None:
        """Somebody predicts how long requests will be; rightly or not, it must not matter."""
        self.cores[at].expect(expected)

    @precondition(lambda self: self._at(0, 1))
    @rule(at=engines)
    def fail_a_step(self, at: int) -> None:
        if self.cores[at].runnable:
            self.executors[at].failures.append(RuntimeError("broken"))
            self._take(at, self.cores[at].step())
            self.executors[at].failures.clear()

    @precondition(lambda self: self._at(0, 1))
    @rule(data=st.data())
    def export(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self._at(0, 1)))
        at, request_id = request.at, request.spec.request_id
        assert at is not None
        try:
            exported = self.cores[at].export(request_id)
        except UnknownRequest:
            return  # it waits or is held already
        assert list(exported.spec.output_token_ids) == request.token_ids
        self.held[request_id] = at

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.held)))
        if not any(transfer.request.spec.request_id == request_id for transfer in self.transfers):
            self.cores[self.held.pop(request_id)].resume(request_id)
            self.holding.discard(request_id)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), headroom=st.integers(0, 4))
    def reserve(self, data: st.DataObject, headroom: int) -> None:
        request = self.requests[data.draw(st.sampled_from(sorted(self.held)))]
        request_id, source = request.spec.request_id, self.held[request.spec.request_id]
        if any(transfer.request is request for transfer in self.transfers):
            return
        tokens = len(request.spec.prompt_token_ids) + len(request.token_ids)
        reserved = self.cores[1 - source].reserve(
            request_id, request.spec.epoch + 1, min(tokens + headroom, MAX_SEQUENCE_TOKENS)
        )
        if reserved is not None:
            block_ids, resident_tokens = self.cores[source].held(request_id)
            self.transfers.append(Transfer(request, source, 1 - source, block_ids, reserved, resident_tokens))

    @precondition(lambda self: self.transfers)
    @rule(data=st.data(), loses_kv=st.booleans())
    def start(self, data: st.DataObject, loses_kv: bool) -> None:
        transfer = self.transfers.pop(data.draw(st.integers(0, len(self.transfers) - 1)))
        self._start(transfer, loses_kv=loses_kv)

    @precondition(lambda self: self.transfers)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        transfer = self.transfers.pop(data.draw(st.integers(0, len(self.transfers) - 1)))
        request_id = transfer.request.spec.request_id
        assert self.cores[transfer.target].cancel(request_id, transfer.request.spec.epoch + 1)

    # What must hold

    @invariant()
    def books_balance(self) -> None:
        for core in self.cores:
            core.check_integrity()

    def teardown(self) -> None:
        """The disturbances end: everything that is held or lost goes on, and all requests must end."""
        for transfer in self.transfers:
            self._start(transfer, loses_kv=False)
        self.transfers = []
        for request_id in list(self.held):
            self.cores[self.held.pop(request_id)].resume(request_id)
            self.holding.discard(request_id)
        for _ in range(200):
            for request in self._at(None):
                self._add(request, request.next_spec(), 0, hold=False)
            for at, core in enumerate(self.cores):
                self._drain(at, core)
            for request_id in list(self.held):
                self.cores[self.held.pop(request_id)].resume(request_id)
            if all(request.finish_reason for request in self.requests.values()):
                break
        for request in self.requests.values():
            assert request.token_ids == request.expected
            assert request.finish_reason is request.expected_reason
        for core in self.cores:
            assert core.idle
            assert core.load().free_blocks == TOTAL_BLOCKS

    def _drain(self, at: int, core: EngineCore) -> None:
        budget = 200 + 100 * len(self.requests)
        while core.runnable:
            self._take(at, core.step())
            core.check_integrity()
            budget -= 1
            assert budget, f"no progress: {core!r}"

    def _at(self, *places: int | None) -> list[Request]:
        return [request for request in self.requests.values() if request.finish_reason is None and request.at in places]

    def _add(self, request: Request, spec: SequenceSpec, at: int, hold: bool) -> None:
        self._lose(request)
        try:
            self.cores[at].add(spec, hold=hold)
        except QueueFull:
            # A refusal changes nothing: an older epoch is still there, and a router would cancel it.
            self.cores[at].cancel(spec.request_id)
            return
        request.at = at
        if hold:
            self.holding.add(spec.request_id)

    def _lose(self, request: Request) -> None:
        """The engine no longer has it; what was under way with it is void."""
        request_id = request.spec.request_id
        request.at = None
        self.held.pop(request_id, None)
        self.holding.discard(request_id)
        for transfer in [each for each in self.transfers if each.request is request]:
            self.transfers.remove(transfer)
            self.cores[transfer.target].cancel(request_id)

    def _start(self, transfer: Transfer, *, loses_kv: bool) -> None:
        request, source, target = transfer.request, self.cores[transfer.source], self.cores[transfer.target]
        request_id = request.spec.request_id
        for block_id, source_block_id in zip(transfer.target_block_ids, transfer.source_block_ids, strict=False):
            self.executors[transfer.target].copy_block(block_id, self.executors[transfer.source], source_block_id)
        assert source.release(request_id, request.spec.epoch)
        del self.held[request_id]
        self.holding.discard(request_id)
        resident_tokens = transfer.resident_tokens // 2 if loses_kv else transfer.resident_tokens
        target.start(request.next_spec(), resident_tokens)
        request.at = transfer.target

    def _take(self, at: int, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            request = self.requests[output.request_id]
            assert output.epoch == request.spec.epoch
            assert output.offset == len(request.token_ids)
            request.token_ids += output.token_ids
            assert request.token_ids == request.expected[: len(request.token_ids)]
            request.finish_reason = output.finish_reason
            if output.error is not None or output.finish_reason is not None:
                request.at = None
                self.holding.discard(output.request_id)
            elif output.request_id in self.holding:
                self.holding.remove(output.request_id)
                self.held[output.request_id] = at


TestEngines = EnginesMachine.TestCase
TestEngines.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


@pytest.mark.fast
class TestEnginesInShort(EnginesMachine.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=20, stateful_step_count=50, deadline=None)
