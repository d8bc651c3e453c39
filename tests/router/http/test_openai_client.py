"""OpenAI's own client, synchronous and asynchronous, against a real listening server."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.router.conftest import TIMEOUT_S, until
from tests.router.http.conftest import MODEL, HttpMesh, answer_to, chat_prompt

HELLO = chat_prompt("hello")


async def test_a_chat_completion(front: HttpMesh) -> None:
    await front.start()
    answer = await front.chat(tokens=20)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.system_fingerprint == "fp_rev"
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content == answer_to(HELLO, 20)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(HELLO), 20, len(HELLO) + 20)
    assert usage.prompt_tokens_details.cached_tokens == 3
    await front.nothing_left()


async def test_a_streamed_chat_completion(front: HttpMesh) -> None:
    await front.start()
    chunks = [chunk async for chunk in await front.chat(stream=True, stream_options={"include_usage": True})]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    first, *middle, last, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None for chunk in [*middle, last])
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == answer_to(HELLO, 20)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert last.choices[0].delta.content is None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert usage.choices == []
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (len(HELLO), 20)
    await front.nothing_left()


async def test_a_stream_has_no_usage_unless_asked_for(front: HttpMesh) -> None:
    await front.start()
    chunks = [chunk async for chunk in await front.chat(stream=True)]
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_the_bytes_of_a_stream(front: HttpMesh) -> None:
    """As clients in other languages read it."""
    await front.start()
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "stream": True}
    response = await front.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    assert "server" not in response.headers
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


async def test_completions(front: HttpMesh) -> None:
    await front.start()
    answer = await front.complete()
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (answer_to("hello", 20), "length")
    tokens = await front.complete([ord(letter) for letter in "hello"], tokens=4)
    assert tokens.choices[0].text == answer_to("hello", 4)
    short = await front.client.completions.create(model=MODEL, prompt="hello")
    assert short.usage is not None
    assert short.usage.completion_tokens == 16
    chunks = [chunk async for chunk in await front.complete(stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer_to("hello", 20)
    assert chunks[-1].choices[0].finish_reason == "length"
    await front.nothing_left()


async def test_several_choices_share_an_answer(front: HttpMesh) -> None:
    await front.start(decodes=2)
    answer = await front.complete(["hello", "there"], n=2, tokens=5, seed=9)
    texts = [answer_to("hello", 5)] * 2 + [answer_to("there", 5)] * 2
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    # A prompt counts once, however many answers it has.
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 20)
    seeds = [spec.sampling.seed for decode in front.decodes for spec in decode.specs]
    assert sorted(seeds) == [9, 9, 10, 10]
    streamed: dict[int, str] = {}
    async for chunk in await front.chat(n=3, stream=True):
        index = chunk.choices[0].index
        streamed[index] = streamed.get(index, "") + (chunk.choices[0].delta.content or "")
    assert streamed == dict.fromkeys(range(3), answer_to(HELLO, 20))
    await front.nothing_left()


async def test_stop_strings_end_the_answer(front: HttpMesh) -> None:
    await front.start()
    whole = answer_to(HELLO, 20)
    for stop in (whole[4:7], [whole[4:7], "never"]):
        answer = await front.chat(stop=stop)
        assert answer.choices[0].message.content == whole[: whole.find(whole[4:7])]
        assert answer.choices[0].finish_reason == "stop"
        text, reason = "", None
        async for chunk in await front.chat(stop=stop, stream=True):
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason
        assert (text, reason) == (whole[: whole.find(whole[4:7])], "stop")
    await front.nothing_left()


async def test_sampling_reaches_the_instances(front: HttpMesh) -> None:
    await front.start()
    ours = {"top_k": 7, "repetition_penalty": 1.5, "ignore_eos": True, "priority": 5, "request_id": "mine"}
    await front.chat(temperature=0.25, top_p=0.5, seed=-1, extra_body=ours, user="u", store=False)
    (spec,) = front.prefills[0].specs
    sampling = spec.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.25, 0.5, -1)
    assert (sampling.top_k, sampling.repetition_penalty, sampling.ignore_eos) == (7, 1.5, True)
    assert (spec.priority, spec.request_id) == (5, "mine")


async def test_requests_have_names(front: HttpMesh) -> None:
    await front.start()
    create = front.client.chat.completions.with_raw_response.create
    messages: Any = [{"role": "user", "content": "hello"}]
    raw = await create(model=MODEL, messages=messages, max_tokens=3, extra_headers={"X-Request-Id": "from-header"})
    assert raw.headers["x-request-id"] == "from-header"
    assert raw.parse().id == "chatcmpl-from-header"
    raw = await create(model=MODEL, messages=messages, max_tokens=3)
    assert raw.parse()._request_id == raw.headers["x-request-id"] == raw.parse().id.removeprefix("chatcmpl-")
    async with front.client.chat.completions.with_streaming_response.create(
        model=MODEL, messages=messages, max_tokens=3, stream=True, extra_body={"request_id": "streamed"}
    ) as stream:
        assert stream.headers["x-request-id"] == "streamed"
        lines = [line async for line in stream.iter_lines()]
        assert lines[-2:] == ["data: [DONE]", ""]
    await front.chat(n=2, tokens=3, extra_body={"request_id": "both"})
    names = [spec.request_id for spec in front.prefills[0].specs]
    assert names[0] == "from-header"
    assert (names[2], *sorted(names[3:])) == ("streamed", "both.0", "both.1")


async def test_models(front: HttpMesh) -> None:
    await front.start()
    models = await front.client.models.list()
    assert [model.id for model in models.data] == [MODEL]
    model = await front.client.models.retrieve(MODEL)
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "starmesh")
    assert model.max_model_len == 512  # type: ignore[attr-defined] # vLLM's field
    with pytest.raises(openai.NotFoundError) as caught:
        await front.client.models.retrieve("org/other")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_the_synchronous_client(front: HttpMesh) -> None:
    await front.start()

    def use() -> tuple[str | None, str]:
        messages: Any = [{"role": "user", "content": "hello"}]
        with openai.OpenAI(base_url=f"{front.url}/v1", api_key="any", max_retries=0, timeout=TIMEOUT_S) as client:
            whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=20)
            with client.chat.completions.create(model=MODEL, messages=messages, max_tokens=20, stream=True) as stream:
                streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        return whole.choices[0].message.content, streamed

    assert await asyncio.to_thread(use) == (answer_to(HELLO, 20), answer_to(HELLO, 20))


async def test_the_client_comes_again_when_it_is_told_to(front: HttpMesh) -> None:
    """An overloaded router says when; OpenAI's client obeys by itself."""
    await front.start(max_requests=1)
    front.decodes[0].pause_after = 2
    first = asyncio.create_task(front.chat())
    await until(lambda: front.decodes[0].running)
    patient = front.connect(max_retries=8)
    messages: Any = [{"role": "user", "content": "hello"}]
    second = asyncio.create_task(patient.chat.completions.create(model=MODEL, messages=messages, max_tokens=20))
    with pytest.raises(openai.RateLimitError) as caught:
        await front.chat()
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.response.headers["retry-after-ms"] == "1000"
    front.decodes[0].resume()
    assert (await first).choices[0].message.content == answer_to(HELLO, 20)
    assert (await second).choices[0].message.content == answer_to(HELLO, 20)


async def test_sixteen_streams_at_once(front: HttpMesh) -> None:
    await front.start(decodes=2)

    async def stream(number: int) -> str:
        return "".join(
            [
                chunk.choices[0].delta.content or ""
                async for chunk in await front.chat(f"p{number}", stream=True, tokens=60)
            ]
        )

    texts = await asyncio.gather(*(stream(number) for number in range(16)))
    assert texts == [answer_to(chat_prompt(f"p{number}"), 60) for number in range(16)]
    await front.nothing_left()


async def test_a_stream_survives_the_death_of_its_instance(front: HttpMesh) -> None:
    await front.start(decodes=2)
    for decode in front.decodes:
        decode.pause_after = 8
    streams = [asyncio.create_task(_read(front, f"p{number}")) for number in range(8)]
    await until(lambda: sum(len(decode.sequences) for decode in front.decodes) == 8)
    doomed, heir = front.decodes
    assert doomed.sequences
    await doomed.kill()
    heir.resume()
    assert await asyncio.gather(*streams) == [answer_to(chat_prompt(f"p{number}"), 20) for number in range(8)]
    await front.nothing_left()


async def _read(front: HttpMesh, text: str) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in await front.chat(text, stream=True)])
