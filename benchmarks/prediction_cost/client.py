"""The client of ``benchmarks.prediction_cost``: what a router does to keep a decode instance's batch full, with a time
stamp on every message. A decode instance sends one message for each step, so their spaces are its steps' times."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType

from starmesh.rpc import convert
from starmesh.rpc.channels import open_channel
from starmesh.tokenizer import ModelTokenizer
from starmesh.types import SamplingParams, SequenceSpec
from starmesh.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

TIMEOUT_S = 300.0
MAX_OUTPUT_TOKENS = 2000
COUNTED_NUMBERS = 12


def read_prompts(model: Path, count: int) -> list[tuple[int, ...]]:
    """Beginnings of counts, which greedy decoding goes on with for long: no sequence ends by itself meanwhile."""
    tokenizer = ModelTokenizer.load(model)
    texts = (
        "Count on: " + ", ".join(str(100 * row + number) for number in range(COUNTED_NUMBERS)) + ","
        for row in range(1, count + 1)
    )
    return [tuple(tokenizer.encode(text)) for text in texts]


class Batch:
    """Keeps a sequence for each of ``prompts`` running at one instance, within the context."""

    _numbers = itertools.count()

    def __init__(self, prefill: str, decode: str, prompts: list[tuple[int, ...]]) -> None:
        """``prefill`` and ``decode`` are addresses."""
        self._prompts = prompts
        self._channels = [open_channel(prefill), open_channel(decode)]
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(self._channels[0])
        self._outgoing: asyncio.Queue[decode_pb2.DecodeRequest] = asyncio.Queue()
        self._rows: dict[str, int] = {}
        self._messages: list[tuple[float, int]] = []  # when, and with how many tokens
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    async def __aenter__(self) -> Batch:
        stub = decode_pb2_grpc.DecodeServiceStub(self._channels[1])
        self._spawn(self._read(stub.Decode(self._requests())))
        for row in range(len(self._prompts)):
            self._spawn(self._start(row))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def full(self) -> None:
        """Wait for a step of all sequences."""
        seen = len(self._messages)
        while not any(tokens >= len(self._prompts) for _, tokens in self._messages[seen:]):
            await self._more()

    async def steps(self, count: int) -> list[float]:
        """The next ``count`` times of steps, in seconds: spaces between messages that have a token of every sequence.
        Others, as when one has ended and another has not begun, are left out."""
        start = len(self._messages)
        while len(found := self._spaces(start)) < count:
            await self._more()
        return found

    @property
    def messages(self) -> int:
        """How many messages there were, steps of any size."""
        return len(self._messages)

    def _spaces(self, start: int) -> list[float]:
        return [
            later_s - earlier_s
            for (earlier_s, before), (later_s, after) in itertools.pairwise(self._messages[start:])
            if min(before, after) >= len(self._prompts)
        ]

    async def _more(self) -> None:
        if self._error is not None:
            raise RuntimeError("the batch failed") from self._error
        self._news.clear()
        async with asyncio.timeout(TIMEOUT_S):
            await self._news.wait()

    def _spawn(self, work: object) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = task.exception()
            self._news.set()

    async def _requests(self) -> AsyncIterator[decode_pb2.DecodeRequest]:
        while True:
            yield await self._outgoing.get()

    async def _read(self, call: object) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            async for response in call:  # type: ignore[attr-defined]
                tokens = 0
                for output in response.outputs:
                    if output.HasField("failure"):
                        raise RuntimeError(f"{output.request_id} failed: {output.failure.message}")
                    tokens += len(output.token_ids)
                    if output.finish_reason:
                        self._spawn(self._start(self._rows.pop(output.request_id)))
                self._messages.append((time.perf_counter(), tokens))
                self._news.set()

    async def _start(self, row: int) -> None:
        """Prefill a row's prompt and hand it over, with the prompt's sample, as a router does."""
        sampling = SamplingParams(max_output_tokens=MAX_OUTPUT_TOKENS, temperature=0.0)
        spec = SequenceSpec(f"row-{next(self._numbers)}", 1, self._prompts[row], (), sampling)
        sequence = convert.spec_pb(spec)
        prefilled = await self._prefill.Prefill(prefill_pb2.PrefillRequest(sequence=sequence), timeout=TIMEOUT_S)
        sequence.output_token_ids[:] = [prefilled.token_id]
        self._rows[spec.request_id] = row
        start = decode_pb2.StartSequence(
            sequence=sequence,
            ticket=prefilled.ticket,
            timeout=convert.duration_pb(TIMEOUT_S),
            hidden_state=prefilled.hidden_state,
        )
        self._outgoing.put_nowait(decode_pb2.DecodeRequest(start=start))
