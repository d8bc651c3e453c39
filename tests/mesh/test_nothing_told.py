"""What clients say and are told stays between them and the engines: prompts, answers, tokens and keys are in no log
line at any level, in no span and on no page of metrics, also of requests that fail, move, are recovered or make no
sense."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import pytest

from starmesh.emulation.requests import emulated_prompt
from starmesh.rpc.client_channel import KeyedChannel
from starmesh.rpc.key_file import ApiKey, Scope, digest_of, new_secret, write_keys
from starmesh.telemetry import names
from starmesh.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc, sequence_pb2
from tests.mesh.processes import Mesh, until
from tests.mesh.streams import generate
from tests.rpc.every_rpc import SERVICES, attempt
from tests.telemetry.pages import page_url, scrape

MARK = "quokka-lantern-zanzibar"
# Ids that only a client has named, and the tokens and the text of emulated answers to a prompt of 700 tokens.
TOKEN_IDS = [30_011, 30_013, 30_029, 30_047]
FLAGS = ("--engine", "emulated", "--profile", "h100-7b", "--metrics-listen", "127.0.0.1:0")
ANSWER = re.compile(r"70[0-9]\D{1,3}70[0-9]\D{1,3}70[0-9]")
TIMEOUT_S = 60.0


def prompt(output_tokens: int) -> str:
    return emulated_prompt(700, output_tokens, note=MARK)


def messages() -> list[inference_pb2.GenerateRequest]:
    """Good ones, all ways to ask."""
    chat = [inference_pb2.ChatMessage(role=role, content=f"{role} {prompt(30)}") for role in ("system", "user")]
    stops = sequence_pb2.SamplingParams(stop_strings=[MARK, f"{MARK} too"], max_output_tokens=40)
    return [
        inference_pb2.GenerateRequest(text=prompt(30)),
        inference_pb2.GenerateRequest(text=prompt(30), sampling=stops),
        inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=chat), sampling=stops),
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(token_ids=TOKEN_IDS), sampling=stops),
    ]


def nonsense() -> list[inference_pb2.GenerateRequest]:
    """What is refused, in words that name the field."""
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role=MARK, content=MARK)])
    return [
        inference_pb2.GenerateRequest(chat=chat),
        inference_pb2.GenerateRequest(text=MARK, sampling=sequence_pb2.SamplingParams(temperature=-1)),
        inference_pb2.GenerateRequest(text=MARK, sampling=sequence_pb2.SamplingParams(stop_strings=[MARK] * 1000)),
        inference_pb2.GenerateRequest(text=MARK * 400_000),
        inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(token_ids=[*TOKEN_IDS, 2**31 - 1])),
        inference_pb2.GenerateRequest(text=MARK, output_token_ids=[*TOKEN_IDS, 2**31 - 1]),
    ]


async def test_nobody_tells_what_clients_say(tmp_path: Path) -> None:
    secret = new_secret()
    key_file = tmp_path / "keys"
    write_keys(key_file, (ApiKey(key_id="alice", sha256=digest_of(secret), scopes=frozenset(Scope)),))
    environment = {"STARMESH_LOG_LEVEL": "debug", "OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    async with Mesh(tmp_path, tmp_path, environment) as mesh:
        engines = (*FLAGS, "--transfer", "stream")
        await asyncio.gather(
            *(mesh.start(role, f"{role}-{index}", *engines) for role, index in (("prefill", 0), *DECODES)),
            mesh.start("predictor", "predictor-0", *FLAGS),
            mesh.start("rescheduler", "rescheduler-0", *FLAGS),
            mesh.start("router", "router", *FLAGS, "--api-keys", str(key_file), "--http-listen", "127.0.0.1:0"),
        )
        async with KeyedChannel(mesh.channel(), secret) as channel:
            inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            await until(lambda: served(inference), "an answer")
            for message in messages():
                answer = await generate(inference, message, timeout_s=TIMEOUT_S)
                assert answer.token_ids
            await many(inference)
            for message in nonsense():
                with pytest.raises(grpc.aio.AioRpcError):
                    await generate(inference, message, timeout_s=TIMEOUT_S)
            for rpc in [rpc for service in SERVICES.values() for rpc in service]:
                # Text in UTF-8 that is no message, with a key and without.
                await attempt(channel, rpc, MARK.encode() * 10)
                await attempt(mesh.channel(), rpc, MARK.encode())
            await over_http(mesh, secret)
            await troubled(mesh, channel)
        pages = [
            await asyncio.to_thread(scrape, page_url(service.log.read_text()))
            for service in mesh.services.values()
            if service.process.returncode is None
        ]
        assert len(pages) == len(mesh.services) - 1
        await stop(mesh)
        logs = {service.name: service.log.read_text() for service in mesh.services.values()}
    told = {**logs, "metrics": str(pages)}
    for name, text in told.items():
        for word in (MARK, MARK.encode().hex(), secret, secret.removeprefix("sm-")):
            assert word not in text, (name, context_of(word, text))
        for pattern in (ANSWER, re.compile(r"\D{1,3}".join(map(str, TOKEN_IDS[:2])))):
            found = pattern.search(text)
            assert found is None, (name, context_of(found.group(), text) if found else "")
    # There was something to be found in.
    assert all(" DEBUG " in log for log in logs.values()), [name for name in logs if " DEBUG " not in logs[name]]
    spans = (names.SPAN_GENERATE, names.SPAN_PREFILL, names.SPAN_DECODE, names.SPAN_HANDOFF, names.SPAN_ROUND)
    for span in spans:
        assert any(f'"name": "{span}"' in log for log in logs.values()), span
    assert "alice" not in str(pages)


DECODES = (("decode", 0), ("decode", 1))


async def served(inference: Any) -> bool:
    try:
        await generate(inference, inference_pb2.GenerateRequest(text=prompt(2)), timeout_s=TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return True


async def many(inference: Any) -> None:
    """The same over one stream, sense and nonsense."""
    asked = [*messages(), *nonsense()[:3]]

    async def requests() -> AsyncIterator[inference_pb2.GenerateManyRequest]:
        for number, message in enumerate(asked):
            message.request_id = f"many-{number}"
            yield inference_pb2.GenerateManyRequest(generate=message)

    ended = 0
    async for response in inference.GenerateMany(requests(), timeout=TIMEOUT_S):
        ended += len(response.failures) + sum(bool(answer.finish_reason) for answer in response.responses)
    assert ended == len(asked)


async def over_http(mesh: Mesh, secret: str) -> None:
    """Good, bad and broken bodies, with the right key and with a wrong one."""
    url = re.findall(r"HTTP on (http\S+)", mesh.services["router"].log.read_text())[0]
    good = {"model": "emulated", "messages": [{"role": "user", "content": prompt(20)}]}
    bodies: list[Any] = [
        {**good, "messages": [{"role": MARK, "content": MARK}]},
        {**good, "temperature": MARK},
        {**good, "stop": [MARK] * 100},
        {**good, MARK: MARK},
        {**good, "messages": MARK},
    ]
    async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        headers = {"authorization": f"Bearer {secret}"}
        model = (await client.get("/v1/models", headers=headers)).json()["data"][0]["id"]
        for stream in (False, True):
            answer = await client.post(
                "/v1/chat/completions", json={**good, "model": model, "stream": stream}, headers=headers
            )
            assert answer.status_code == 200, answer.text
        for body in bodies:
            refused = await client.post("/v1/chat/completions", json={**body, "model": model}, headers=headers)
            assert refused.status_code >= 400 or MARK in body
        broken = await client.post("/v1/chat/completions", content=f'{{"{MARK}'.encode(), headers=headers)
        assert broken.status_code >= 400
        stranger = {"authorization": f"Bearer sm-{MARK}"}
        assert (await client.post("/v1/chat/completions", json=good, headers=stranger)).status_code == 401


async def troubled(mesh: Mesh, channel: Any) -> None:
    """A request that moves, loses its instance, and is cancelled in the end."""
    inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    cluster: Any = cluster_pb2_grpc.ClusterServiceStub(channel)
    call = inference.Generate(inference_pb2.GenerateRequest(text=prompt(5000), request_id="long"), timeout=TIMEOUT_S)
    await call.read()

    async def owner() -> str:
        return (await mesh.owners()).get("long", "")

    async def move() -> bool:
        target = ({"decode-0", "decode-1"} - {await owner()}).pop()
        asked = cluster_pb2.MigrateSequenceRequest(request_id="long", target_instance_id=target)
        try:
            async for _ in cluster.MigrateSequence(asked, timeout=TIMEOUT_S):
                pass
        except grpc.aio.AioRpcError:
            return False
        return await owner() == target

    await until(move, "a move")
    killed = mesh.services[await owner()]
    killed.kill()
    await killed.process.wait()
    seen = 0
    while seen < 50:
        message = await call.read()
        seen += len(message.token_ids)
    await inference.Cancel(inference_pb2.CancelRequest(request_id="long"), timeout=TIMEOUT_S)
    while (message := await call.read()) is not grpc.aio.EOF and not message.finish_reason:
        pass


async def stop(mesh: Mesh) -> None:
    """End all services in order: what they still have to tell is told then."""
    for service in mesh.services.values():
        if service.process.returncode is None:
            service.process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(TIMEOUT_S):
        for service in mesh.services.values():
            await service.process.wait()


def context_of(word: str, text: str) -> str:
    """The line that it is in."""
    start = text.index(word)
    return text[max(0, start - 300) : start + 100]
