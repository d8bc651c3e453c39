"""``starmesh predictor collect`` on a real cluster: interrupted, continued, and nothing stored twice."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from starmesh.cli.predictor_status import look_at_predictor
from starmesh.cli.router import connect
from starmesh.prediction.shards import read_manifest, read_sequences
from tests.mesh.processes import until

PROMPTS = 24
MAX_OUTPUT_TOKENS = 300
TIMEOUT_S = 180.0


@pytest.fixture(scope="module")
def ending_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, each 200th of whose tokens ends a sequence: one of random weights draws any token alike."""
    directory = tmp_path_factory.mktemp("ending") / "ending-model"
    shutil.copytree(tiny_model_dir, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 49152, 200))}))
    return directory


class Collecting:
    """A running ``starmesh predictor collect``."""

    def __init__(self, directory: Path, model: Path, name: str, *flags: str) -> None:
        self.log = directory / f"{name}.log"
        self.out = directory / "samples"
        prompts = directory / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": f"Prompt {number}."}) + "\n" for number in range(PROMPTS)))
        self._command = [
            *(sys.executable, "-m", "starmesh.cli", "predictor", "collect", str(prompts), "--out", str(self.out)),
            *("--model", str(model), "--max-tokens", str(MAX_OUTPUT_TOKENS), "--kv-memory-mib", "16"),
            *("--temperature", "1.5", "--run-dir", str(directory / name), *flags),
        ]

    async def start(self) -> asyncio.subprocess.Process:
        with self.log.open("wb") as output:
            return await asyncio.create_subprocess_exec(
                *self._command, stdout=output, stderr=output, stdin=asyncio.subprocess.DEVNULL
            )

    async def end(self, process: asyncio.subprocess.Process) -> int:
        async with asyncio.timeout(TIMEOUT_S):
            return await process.wait()

    def said(self) -> str:
        return self.log.read_text()

    def stored(self) -> Counter[str]:
        return Counter(sequence.request_id for sequence in read_sequences(self.out))


async def test_a_collection_goes_on_where_it_was_interrupted(tmp_path: Path, ending_model_dir: Path) -> None:
    first = Collecting(tmp_path, ending_model_dir, "first", "--concurrency", "2")
    process = await first.start()

    def address() -> str:
        assert process.returncode is None, first.said()
        found = re.search(r"router-0 serves at (\S+)", first.said())
        return found[1] if found else ""

    await until(address, "the router", TIMEOUT_S, first.said)
    async with connect(address()) as router:

        async def some_ended() -> bool:
            state = await look_at_predictor(router)
            return state is not None and state.status.ended_sequences >= 3

        await until(some_ended, "some requests to end", TIMEOUT_S, first.said)
    process.send_signal(signal.SIGINT)
    assert await first.end(process) == 130, first.said()
    assert "interrupted; the same command goes on from here" in first.said()
    before = first.stored()
    assert 3 <= len(before) < PROMPTS
    assert set(before.values()) == {1}

    second = Collecting(tmp_path, ending_model_dir, "second")
    assert await second.end(await second.start()) == 0, second.said()
    assert f"{len(before)} of {PROMPTS} requests are stored already" in second.said()
    assert f"next: starmesh predictor train {second.out}" in second.said()
    assert second.stored() == Counter(f"p{number}-0" for number in range(PROMPTS))
    assert read_manifest(second.out).layout.layers
    for sequence in read_sequences(second.out):
        assert sequence.finished == (sequence.total_output_tokens < MAX_OUTPUT_TOKENS)
        assert list(sequence.output_tokens) == list(range(0, sequence.total_output_tokens, 20))

    third = Collecting(tmp_path, ending_model_dir, "third")
    assert await third.end(await third.start()) == 0, third.said()
    assert "nothing is left to ask" in third.said()
