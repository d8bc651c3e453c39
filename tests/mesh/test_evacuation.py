"""Decode processes leave one after another under load, by SIGTERM and by drain, and no stream breaks."""

from __future__ import annotations

import asyncio
from pathlib import Path

from starmesh.v1 import cluster_pb2
from tests.mesh.processes import NOBODY_DIES, Mesh, until
from tests.mesh.prompts import PROMPTS
from tests.mesh.streams import generate_all, request

OUTPUT_TOKENS = 1200


async def test_streams_survive_instances_that_leave(tiny_model_dir: Path, tmp_path: Path) -> None:
    """No prefill is run again: whatever an instance had is moved while it goes on."""
    async with Mesh(tmp_path, tiny_model_dir, NOBODY_DIES, forked=True) as mesh:
        await mesh.start_all(prefill=1, decode=3, flags=("--kv-memory-mib", "64", "--grace-s", "60"))
        messages = [request(prompt, max_output_tokens=OUTPUT_TOKENS, ignore_eos=True) for prompt in PROMPTS[:12]]
        undisturbed = await generate_all(mesh.inference(), messages)
        await mesh.settled()

        begun, tokens = asyncio.Event(), 0

        def on_token(count: int) -> None:
            nonlocal tokens
            tokens = count
            if tokens > 10 * len(messages):
                begun.set()

        running = asyncio.create_task(generate_all(mesh.inference(), messages, on_token=on_token))
        await asyncio.wait_for(begun.wait(), 120)
        stopped = mesh.services["decode-0"]
        stopped.terminate()
        assert await asyncio.wait_for(stopped.process.wait(), 180) == 0
        assert not running.done(), "it has waited for the ends of its streams"

        await mesh.cluster().Drain(cluster_pb2.DrainRequest(instance_id="decode-1"), timeout=10)

        async def drained() -> bool:
            states = {instance.instance_id: instance.state for instance in await mesh.instances()}
            return states["decode-1"] == cluster_pb2.INSTANCE_STATE_DRAINED

        await until(drained, "decode-1 to report DRAINED")
        assert not running.done(), "it has waited for the ends of its streams"

        answers = await running
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in undisturbed]
        usages = [answer.usage for answer in answers if answer.usage is not None]
        assert [usage.recoveries for usage in usages] == [0] * len(messages)
        moves = sum(usage.migrations for usage in usages)
        # A third of them from the first that left, and half of all from the second.
        assert moves >= len(messages) // 3
        last = await mesh.instance("decode-2")
        assert last.instance.load.migrated_sequences >= len(messages) // 2
        await mesh.settled()
        print(f"{moves} moves of {len(messages)} sequences, {tokens} tokens")
