"""Exactness over processes: prefilled in one, handed over, decoded in another, token for token what ``generate()`` of
transformers makes of each prompt alone. Greedy, fp32, 32 prompts that arrive one after the other, on a decode instance
whose KV memory is so small that sequences are preempted and recomputed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from starmesh.v1 import inference_pb2, sequence_pb2
from tests.mesh.processes import Mesh
from tests.mesh.streams import Answer, generate
from tests.prompts import prompt_token_ids

OUTPUT_TOKENS = (32, 12, 24, 40)


@pytest.mark.timeout(1500)
async def test_32_prompts_handed_over_are_exact(model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tests.reference import Reference

    prompts = prompt_token_ids(AutoTokenizer.from_pretrained(model_dir))
    limits = [OUTPUT_TOKENS[number % len(OUTPUT_TOKENS)] for number in range(len(prompts))]
    async with Mesh(tmp_path, model_dir) as mesh:
        await asyncio.gather(
            mesh.start("prefill", "prefill-0", "--kv-memory-mib", "256", "--max-step-tokens", "64"),
            # 34 blocks of 16 tokens: two or three of these sequences at a time.
            mesh.start("decode", "decode-0", "--kv-memory-mib", "24", "--max-step-tokens", "64"),
        )
        # Reserve next to no room for outputs, so that the instance is overcommitted and has to preempt. The last ones
        # wait for room until nearly all have ended.
        await mesh.start("router", "router", "--reserve-output-tokens", "1", "--queue-timeout-s", "600")
        await mesh.all_seen(3)
        stub = mesh.inference()

        async def answer(number: int) -> Answer:
            message = inference_pb2.GenerateRequest(
                token_ids=inference_pb2.TokenIds(token_ids=prompts[number]),
                sampling=sequence_pb2.SamplingParams(temperature=0.0, max_output_tokens=limits[number]),
            )
            return await generate(stub, message, timeout_s=600)

        running = []
        for number in range(len(prompts)):
            running.append(asyncio.create_task(answer(number)))
            await asyncio.sleep(0.1)  # staggered, so that batches are of mixed ages
        answers = await asyncio.gather(*running)
        preemptions = (await mesh.instance("decode-0")).instance.load.preemptions
        assert preemptions > 0
        await mesh.settled()

    def compare() -> int:
        reference = Reference(model_dir)
        return sum(
            reference.near_ties(f"prompt {number}", prompt, answer.token_ids, max_output_tokens=limit)
            for number, (prompt, answer, limit) in enumerate(zip(prompts, answers, limits, strict=True))
        )

    near_ties = await asyncio.to_thread(compare)
    print(f"exact: {len(prompts)} prompts handed over, {preemptions} preemptions, {near_ties} near ties")
