"""Samples of live traffic become the predictor that answers next: collected, trained, served, and promoted under load,
by the commands that an operator gives."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from starmesh.cli.app import app
from starmesh.cli.collection import left_out, plan_requests
from starmesh.engine.engine import HIDDEN_EVERY_TOKENS
from starmesh.prediction.shards import read_manifest, read_sequences
from starmesh.v1 import cluster_pb2
from tests.mesh.predictor_load import Asker, Traffic
from tests.mesh.processes import Mesh, until
from tests.mesh.prompts import PROMPTS
from tests.mesh.sightings import sightings
from tests.mesh.streams import generate, request

# Decode instances wait so long on a busy machine: a call that is not answered in time takes its samples along.
PATIENT = {"STARMESH_PREDICTOR_TIMEOUT_S": "10"}
BUILT_IN = "conditional_median"
SAMPLES_PER_PROMPT = 4
MAX_OUTPUT_TOKENS = 200


@pytest.fixture
def talkative_model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with so many tokens that end a text that sampled answers have some sixty tokens."""
    directory = tmp_path / "talkative"
    shutil.copytree(tiny_model_dir, directory)
    path = directory / "config.json"
    ends = list(range(2, 802))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    return directory


async def test_live_traffic_becomes_the_predictor_that_answers(talkative_model_dir: Path, tmp_path: Path) -> None:
    """Collected, trained, served, and promoted back under load."""
    samples, trained = tmp_path / "samples", tmp_path / "predictors"
    trained.mkdir()
    async with Mesh(tmp_path, talkative_model_dir, PATIENT, forked=True) as mesh:
        await mesh.start_all(decode=1, flags=("--kv-memory-mib", "16"))
        predictor = await mesh.start_predictor("--collect", str(samples))
        await _collect(mesh, tmp_path / "prompts.jsonl")
        predictor.terminate()
        assert await predictor.process.wait() == 0
        await _check_samples(samples, mesh)

        file = trained / "tiny-starmesh.safetensors"
        arguments = ["predictor", "train", str(samples), "--out", str(file), "--epochs", "2"]
        result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert result.exit_code == 0, result.output

        await mesh.start_predictor("--predictor", str(file))
        await _promote_under_load(mesh, file.stem)
        await mesh.settled()


async def _collect(mesh: Mesh, prompts: Path) -> None:
    """As an operator does on a cluster that runs."""
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    router = mesh.services["router"].address
    answers = ["--samples-per-prompt", str(SAMPLES_PER_PROMPT), "-n", str(MAX_OUTPUT_TOKENS), "--temperature", "1"]
    flags = ["--router", router, *answers, "--concurrency", "16"]
    collecting = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "starmesh.cli", "predictor", "collect", str(prompts), *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await collecting.communicate()
    assert collecting.returncode == 0, output.decode()


async def _check_samples(directory: Path, mesh: Mesh) -> None:
    """Every request is there that was decoded, labelled by its own end, with a sample of its prompt and others at
    multiples of the interval."""
    stored = {sequence.request_id: sequence for sequence in read_sequences(directory)}
    asked = plan_requests(PROMPTS, requests=None, samples_per_prompt=SAMPLES_PER_PROMPT, seed=0)
    for missing in left_out(asked, set(stored)):
        again = request(missing.prompt, temperature=1.0, seed=missing.seed, max_output_tokens=MAX_OUTPUT_TOKENS)
        answer = await generate(mesh.inference(), again)
        assert len(answer.token_ids) == 1, f"{missing.request_id} was decoded and is not stored"
    layout = read_manifest(directory).layout
    for sequence in stored.values():
        positions = sequence.output_tokens.tolist()
        assert positions[0] == 0 and positions[-1] < sequence.total_output_tokens
        assert all(position % HIDDEN_EVERY_TOKENS == 0 for position in positions)
        assert sequence.hidden_states.shape[1:] == (len(layout.layers), layout.width)
    sampled = sum(len(sequence.output_tokens) for sequence in stored.values())
    due = sum(1 + (sequence.total_output_tokens - 1) // HIDDEN_EVERY_TOKENS for sequence in stored.values())
    print(f"{len(stored)} of {len(asked)} requests stored, with {sampled} of {due} samples")


async def _promote_under_load(mesh: Mesh, version: str) -> None:
    """Streams run, and a caller asks without a pause, while the version that answers changes twice."""
    cluster = mesh.cluster()
    async with Traffic(mesh.inference(), PROMPTS) as traffic:
        await until(lambda: _all_sampled(mesh), "estimates")
        log = mesh.services["decode-0"].log
        told = len(log.read_text())
        status = (await cluster.GetClusterPredictor(cluster_pb2.GetClusterPredictorRequest(), timeout=10)).status
        assert (status.version, status.kind) == (version, "starmesh")
        async with Asker(mesh.channel("predictor-0"), status.layout) as asker:
            await asker.until_answered_by(version)
            for wanted in (BUILT_IN, version):
                promote = cluster_pb2.PromoteClusterPredictorRequest(version=wanted)
                promoted = await cluster.PromoteClusterPredictor(promote, timeout=10)
                assert promoted.status.version == wanted
                await asker.until_answered_by(wanted)
                await traffic.until_answered(16)
                await until(lambda: _all_sampled(mesh), "estimates")
        assert asker.versions == [version, BUILT_IN, version]
    # The decode instance logs a call that is not answered.
    assert "estimates age" not in log.read_text()[told:]
    print(f"{asker.calls} calls and {traffic.answered} requests while the version changed twice, none failed")


async def _all_sampled(mesh: Mesh) -> bool:
    """Whether all that run have estimates, one of them by a sample that the decode instance took."""
    found = (await sightings(mesh)).values()
    return bool(found) and all(seen.age is not None for seen in found) and any(seen.sampled_at for seen in found)
