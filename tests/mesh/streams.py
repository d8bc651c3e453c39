"""Client side of the mesh tests: what a stream brought, checked as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio

from starmesh.v1 import inference_pb2, inference_pb2_grpc, sequence_pb2


@dataclass
class Answer:
    """A finished stream."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: int = sequence_pb2.FINISH_REASON_UNSPECIFIED
    usage: inference_pb2.Usage | None = None
    arrivals: int = 0
    """Messages with tokens: several tokens may come in one."""


def request(text: str, **sampling: object) -> inference_pb2.GenerateRequest:
    """A greedy request for a chat answer to ``text``."""
    params = {"temperature": 0.0, "max_output_tokens": 32} | sampling
    return inference_pb2.GenerateRequest(
        chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content=text)]),
        sampling=sequence_pb2.SamplingParams(**params),  # type: ignore[arg-type]
    )


async def generate(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    message: inference_pb2.GenerateRequest,
    *,
    timeout_s: float = 600.0,
    on_token: Callable[[int], None] = lambda tokens: None,
) -> Answer:
    """Run a request to its end. Checks offsets: no token twice, none missing. ``on_token`` gets the count so far."""
    answer = Answer()
    async for response in stub.Generate(message, timeout=timeout_s):
        assert response.offset == len(answer.token_ids), (
            f"offset {response.offset} after {len(answer.token_ids)} tokens"
        )
        assert not answer.finish_reason, "a message after the last one"
        answer.token_ids += response.token_ids
        answer.arrivals += bool(response.token_ids)
        answer.text += response.text
        answer.finish_reason = response.finish_reason
        if response.HasField("usage"):
            answer.usage = response.usage
        on_token(len(answer.token_ids))
    assert answer.finish_reason, "the stream ended without a finish reason"
    assert answer.usage is not None
    assert answer.usage.output_tokens == len(answer.token_ids)
    return answer


async def generate_all(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
    messages: list[inference_pb2.GenerateRequest],
    *,
    on_token: Callable[[int], None] = lambda tokens: None,
) -> list[Answer]:
    """Run requests at the same time. ``on_token`` gets the sum of tokens so far."""
    counts = [0] * len(messages)

    def counter(index: int) -> Callable[[int], None]:
        def count(tokens: int) -> None:
            counts[index] = tokens
            on_token(sum(counts))

        return count

    return await asyncio.gather(
        *(generate(stub, message, on_token=counter(index)) for index, message in enumerate(messages))
    )


async def cancel(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, messages: list[inference_pb2.GenerateRequest]
) -> None:
    """Cancel those of the requests that have not ended."""
    for message in messages:
        try:
            await stub.Cancel(inference_pb2.CancelRequest(request_id=message.request_id), timeout=30)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
