"""A router in this process, with scripted peers around it and a ledger that can be switched off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.router.config import RouterSettings
from services.router.model import ServedModel
from services.router.serving import RouterProcess
from starmesh.clock import WallClock
from starmesh.ledger import LedgerUnavailable
from starmesh.ledger.memory import MemoryLedger
from starmesh.rpc.channels import open_channel
from starmesh.telemetry.metrics import NO_METRICS, Metrics
from starmesh.tokenizer import ModelTokenizer
from starmesh.tokenizer.chat_template import ChatTemplate
from starmesh.types import ClusterView
from starmesh.v1 import cluster_pb2_grpc, inference_pb2, inference_pb2_grpc, sequence_pb2
from tests.router.decode_peer import DecodePeer
from tests.router.peers import CONTEXT, EOS, TTL_S, VOCABULARY, PrefillPeer, expected_tokens
from tests.router.predictor_peer import PredictorPeer

TIMEOUT_S = 20.0


def letters_model() -> ServedModel:
    """A model's text side in which the token of an ASCII character is its code."""
    vocabulary = {chr(code): code for code in range(33, 127)} | {"Ġ": 32}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = ModelTokenizer(
        backend,
        chat_template=ChatTemplate("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}", {}),
        eos_token_ids=(EOS,),
        vocabulary_tokens=VOCABULARY,
        context_tokens=CONTEXT,
    )
    return ServedModel(name="letters", revision="rev", tokenizer=tokenizer)


class SwitchableLedger(MemoryLedger):
    """A MemoryLedger that does not answer while ``down``, and that can lose everything."""

    def __init__(self) -> None:
        super().__init__(WallClock())
        self.down = False

    def __getattribute__(self, name: str) -> Any:
        asked = name in {"register", "report", "view", "reserve", "release", "claim", "owner", "renew", "disown"}
        return _unavailable if asked and super().__getattribute__("down") else super().__getattribute__(name)

    def restart_empty(self) -> None:
        self._registrations.clear()
        self._owners.clear()

    async def reservations(self) -> list[str]:
        view: ClusterView = await self.view()
        return [item.request_id for instance in view.instances for item in instance.reservations]


async def _unavailable(*args: Any, **kwargs: Any) -> Any:
    raise LedgerUnavailable("switched off by the test")


class Mesh:
    """The router under test and its surroundings."""

    def __init__(self, stack: AsyncExitStack, ledger: Any) -> None:
        self._stack = stack
        self.ledger = ledger
        self.prefills: list[PrefillPeer] = []
        self.decodes: list[DecodePeer] = []
        self.process: RouterProcess
        self.channel: grpc.aio.Channel
        self.inference: inference_pb2_grpc.InferenceServiceAsyncStub
        self.cluster: cluster_pb2_grpc.ClusterServiceAsyncStub

    async def start(
        self, *, prefills: int = 1, decodes: int = 1, metrics: Metrics = NO_METRICS, **settings: Any
    ) -> None:
        for _ in range(prefills):
            await self.add_prefill()
        for _ in range(decodes):
            await self.add_decode()
        defaults: dict[str, Any] = {"view_interval_s": 0.02, "lease_ttl_s": TTL_S, "report_interval_s": 0.05}
        config = RouterSettings(_cli_parse_args=False, **(defaults | {"grace_s": 0.5} | settings))
        process = RouterProcess(config, self.ledger, letters_model(), metrics)
        self.process = await self._stack.enter_async_context(process)
        if prefills and decodes:
            async with asyncio.timeout(TIMEOUT_S):
                await self.process.watch.ready.wait()
        self.channel = await self._stack.enter_async_context(open_channel(self.process.address))
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(self.channel)

    async def add_prefill(self, **options: Any) -> PrefillPeer:
        peer = PrefillPeer(self.ledger, f"prefill-{len(self.prefills)}", **options)
        self.prefills.append(await self._stack.enter_async_context(peer))
        return peer

    async def add_decode(self, **options: Any) -> DecodePeer:
        peer = DecodePeer(self.ledger, f"decode-{len(self.decodes)}", **options)
        self.decodes.append(await self._stack.enter_async_context(peer))
        return peer

    async def add_predictor(self, **options: Any) -> PredictorPeer:
        return await self._stack.enter_async_context(PredictorPeer(self.ledger, **options))

    def generate(
        self, text: str = "hello", *, tokens: int = 20, timeout: float | None = TIMEOUT_S, **fields: Any
    ) -> Any:
        """A Generate call."""
        return self.inference.Generate(generate_request(text, tokens=tokens, **fields), timeout=timeout)

    async def nothing_left(self) -> None:
        """Wait until the router has forgotten every request, here and in the ledger."""
        async with asyncio.timeout(TIMEOUT_S):
            await self.process.router.idle.wait()
        assert await self.ledger.reservations() == []
        assert self.ledger._owners == {}
        assert self.process.dispatcher.queued_requests == 0
        assert all(link.requests == 0 for link in self.process.links._links.values())


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with AsyncExitStack() as stack:
        yield Mesh(stack, SwitchableLedger())


def generate_request(text: str = "hello", *, tokens: int = 20, **fields: Any) -> inference_pb2.GenerateRequest:
    sampling = sequence_pb2.SamplingParams(max_output_tokens=tokens, temperature=0)
    return inference_pb2.GenerateRequest(text=text, sampling=sampling, **fields)


def tokens_after(text: str, count: int) -> list[int]:
    """What the peers generate after ``text``."""
    return expected_tokens([ord(character) for character in text], count)


def text_of(token_ids: list[int]) -> str:
    return "".join(chr(token_id) for token_id in token_ids)


def check_answer(messages: list[inference_pb2.GenerateResponse], text: str, count: int) -> None:
    """Demand the tokens and text of an undisturbed run, each once and in order, and one end."""
    token_ids: list[int] = []
    for message in messages:
        assert message.offset == len(token_ids)
        token_ids += message.token_ids
    assert token_ids == tokens_after(text, count)
    assert "".join(message.text for message in messages) == text_of(token_ids)
    finishes = [message.finish_reason for message in messages]
    assert finishes == [0] * (len(messages) - 1) + [sequence_pb2.FINISH_REASON_LENGTH]
    assert messages[-1].usage.output_tokens == count
    assert messages[-1].usage.prompt_tokens == len(text)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition that no event announces."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)
