"""Which version answers: at the start, by the first samples, after a promotion, under load."""

from __future__ import annotations

import asyncio
import itertools
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

from services.predictor.registry import MAX_NAME_LENGTH, PredictorFiles
from starmesh.prediction.kinds import COUNT_INPUTS, KINDS
from starmesh.prediction.network import Dense, Network
from starmesh.prediction.predictor_file import load_predictor, save_predictor
from starmesh.types import HiddenLayout
from starmesh.v1 import predictor_pb2
from tests.predictor.conftest import Running, failure, serving, until
from tests.predictor.predictors import LAYOUT, WAIT_S, Echo, Files, request, sample, write_file

BUILT_IN = "conditional_median"


async def answering(running: Running, layout: HiddenLayout = LAYOUT) -> str:
    """The version that answers samples."""
    return (await running.predict(request([sample("a", 0, 1, layout)], layout=layout))).version


async def promotion_failure(running: Running, version: str) -> tuple[grpc.StatusCode, str]:
    message = predictor_pb2.PromotePredictorRequest(version=version)
    refused = await failure(running.stub.PromotePredictor(message, timeout=WAIT_S))
    return refused.code, refused.message


async def test_the_first_samples_choose_what_ships_for_their_model(tmp_path: Path) -> None:
    files = Files(shipped={"rev-1": write_file(tmp_path, "for-rev-1"), "rev-2": write_file(tmp_path, "for-rev-2")})
    async with serving(files=files) as running:
        assert (await running.status()).version == BUILT_IN
        assert list((await running.status()).versions) == [BUILT_IN]
        assert await asyncio.gather(*(answering(running) for _ in range(5))) == ["for-rev-1"] * 5
        assert files.loaded == ["for-rev-1"]
        assert list((await running.status()).versions) == [BUILT_IN, "for-rev-1"]


@pytest.mark.parametrize("broken", ["nothing of the kind", "echo rev-1", ""])
async def test_a_broken_one_that_ships_keeps_nobody_from_serving(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_text(broken)
    async with serving(files=Files(shipped={"rev-1": path})) as running:
        assert await answering(running) == BUILT_IN


async def test_whatever_a_file_does_to_its_reader_keeps_nobody_from_serving(tmp_path: Path) -> None:
    def load(path: Path) -> Echo:
        raise TypeError("data type 'bfloat16' not understood")

    path = write_file(tmp_path, "strange")
    files = PredictorFiles(load, {"rev-1": path}.get, lambda: [path])
    async with serving(files=files) as running:
        assert [await answering(running) for _ in range(2)] == [BUILT_IN] * 2
        code, message = await promotion_failure(running, "strange")
        assert code is grpc.StatusCode.FAILED_PRECONDITION and "bfloat16" in message


async def test_one_that_ships_for_other_layers_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout = HiddenLayout("rev-1", (7,), 3)
    async with serving(files=Files(shipped={"rev-1": write_file(tmp_path, "shipped")})) as running:
        assert await answering(running, layout) == BUILT_IN
        assert "[7]" in caplog.text and "[2, 4]" in caplog.text


async def test_a_version_can_be_named(tmp_path: Path) -> None:
    path = write_file(tmp_path, "mine")
    shipped = Files(shipped={"rev-1": write_file(tmp_path, "shipped")})
    other = tmp_path / "other"
    other.mkdir()
    for named, directory in (("mine", tmp_path), (str(path), None), (str(path), other)):
        async with serving(files=shipped, directory=directory, named=named) as running:
            assert (await running.status()).version == await answering(running) == "mine"
    async with serving(files=shipped, named="shipped") as running:
        assert await answering(running) == "shipped"
    async with serving(files=shipped, named=BUILT_IN) as running:
        assert await answering(running) == BUILT_IN
    for named, said in (("missing", "no predictor 'missing'"), ("./no.safetensors", "cannot be read")):
        with pytest.raises(ValueError, match=said):
            async with serving(files=shipped, directory=tmp_path, named=named):
                pass


async def test_files_that_come_later_are_found(tmp_path: Path) -> None:
    async with serving(directory=tmp_path, files=Files()) as running:
        assert await answering(running) == BUILT_IN
        write_file(tmp_path, "b", add=2)
        write_file(tmp_path, "a", add=1)
        (tmp_path / "notes.txt").write_text("no predictor")
        assert list((await running.status()).versions) == [BUILT_IN, "a", "b"]
        write_file(tmp_path, "c", add=3)
        status = await running.promote("c")
        assert (status.version, list(status.versions)) == ("c", [BUILT_IN, "a", "b", "c"])
        assert await answering(running) == "c"
        # Written anew, it is loaded anew.
        write_file(tmp_path, "c", add=30)
        await running.promote("c")
        (entry,) = (await running.predict(request([sample("a", 0, 1)]))).estimates
        assert entry.estimate.remaining_tokens == 31
        assert (await running.promote(BUILT_IN)).version == await answering(running) == BUILT_IN


async def test_a_trained_file_answers(tmp_path: Path) -> None:
    """Weights of zero make every length equally likely; the file is what training writes."""
    kind, edges = KINDS["starmesh"], np.arange(0, 101)
    widths = [LAYOUT.width * len(LAYOUT.layers) + COUNT_INPUTS, *kind.hidden, len(edges) - 1]
    dense = [
        Dense(np.zeros((after, before), dtype=np.float32), np.zeros(after, dtype=np.float32))
        for before, after in itertools.pairwise(widths)
    ]
    ones = np.ones(widths[0], dtype=np.float32)
    save_predictor(
        Network(kind, LAYOUT, 0 * ones, ones, tuple(dense), edges, 2.0), tmp_path / "mine.safetensors", trained={}
    )
    files = PredictorFiles(load_predictor, lambda model_revision: None, list)
    async with serving(directory=tmp_path, files=files) as running:
        assert (await running.promote("mine")).kind == "starmesh"
        (entry,) = (await running.predict(request([sample("a", 20, 1)]))).estimates
        assert (entry.estimate.remaining_tokens, entry.estimate.remaining_tokens_upper) == (50, 90)
        (tmp_path / "half.safetensors").write_bytes((tmp_path / "mine.safetensors").read_bytes()[:500])
        code, message = await promotion_failure(running, "half")
        assert code is grpc.StatusCode.FAILED_PRECONDITION and "half.safetensors" in message


async def test_what_cannot_answer_is_not_promoted(tmp_path: Path) -> None:
    write_file(tmp_path, "good")
    write_file(tmp_path, "foreign", revision="rev-9")
    (tmp_path / "broken.safetensors").write_text("nothing")
    (tmp_path.parent / "outside.safetensors").write_text("echo rev-1 0")
    async with serving(directory=tmp_path, files=Files()) as running:
        await running.promote("good")
        assert await answering(running) == "good"
        code, message = await promotion_failure(running, "missing")
        assert code is grpc.StatusCode.NOT_FOUND and "good" in message
        for name in ("../outside", "good.safetensors", "/etc/passwd"):
            assert (await promotion_failure(running, name))[0] is grpc.StatusCode.NOT_FOUND
        for name in ("", "x" * (MAX_NAME_LENGTH + 1)):
            assert (await promotion_failure(running, name))[0] is grpc.StatusCode.INVALID_ARGUMENT
        code, message = await promotion_failure(running, "broken")
        assert code is grpc.StatusCode.FAILED_PRECONDITION and "train it again" in message
        code, message = await promotion_failure(running, "foreign")
        assert code is grpc.StatusCode.FAILED_PRECONDITION and "rev-9" in message and "rev-1" in message
        assert await answering(running) == "good"


async def test_what_fits_the_samples_that_are_refused_can_be_promoted(tmp_path: Path) -> None:
    """The cluster changed its model."""
    write_file(tmp_path, "old")
    write_file(tmp_path, "new", revision="rev-2")
    async with serving(directory=tmp_path, named="old", files=Files()) as running:
        layout = HiddenLayout("rev-2", LAYOUT.layers, LAYOUT.width)
        refused = await failure(
            running.stub.Predict(request([sample("a", 0, 1, layout)], layout=layout), timeout=WAIT_S)
        )
        assert refused.code is grpc.StatusCode.FAILED_PRECONDITION
        assert (await running.promote("new")).version == await answering(running, layout) == "new"


async def test_a_call_in_progress_ends_with_the_old_version(tmp_path: Path) -> None:
    write_file(tmp_path, "new", add=1000)
    old = Echo(gate=threading.Semaphore(0))
    async with serving(old, directory=tmp_path) as running:
        samples = [sample("a", number, number) for number in range(300)]
        calls = [asyncio.create_task(running.predict(request(samples))) for _ in range(2)]
        await until(lambda: old.batches)
        await running.queued(600 - 256)
        await running.promote("new")
        after = asyncio.create_task(running.predict(request([sample("b", 0, 1)])))
        await running.queued(600 - 256 + 1)
        assert old.gate is not None
        old.gate.release(10)
        for call in calls:
            response = await call
            assert response.version == "given"
            assert [entry.estimate.remaining_tokens for entry in response.estimates] == list(range(300))
        response = await after
        assert response.version == "new" and response.estimates[0].estimate.remaining_tokens == 1001


async def test_versions_change_under_load(tmp_path: Path) -> None:
    """Every call is answered whole, by the one version that it names."""
    adds = {"a": 0, "b": 1000}
    for name, add in adds.items():
        write_file(tmp_path, name, add=add)
    seen: dict[str, int] = {"a": 0, "b": 0}
    stop = asyncio.Event()

    async def client(index: int) -> None:
        number = 0
        while not stop.is_set():
            samples = [sample(f"{index}-{row}", 20 * number, row) for row in range(40)]
            response = await running.predict(request(samples))
            found = [entry.estimate.remaining_tokens for entry in response.estimates]
            assert found == [row + adds[response.version] for row in range(40)]
            seen[response.version] += 1
            number += 1

    async def several_answers_of(version: str) -> None:
        enough = seen[version] + 3
        await until(lambda: seen[version] >= enough)

    async with serving(directory=tmp_path, named="a", files=Files()) as running, asyncio.TaskGroup() as clients:
        for index in range(8):
            clients.create_task(client(index))
        for number in range(20):
            version = "ba"[number % 2]
            await running.promote(version)
            await several_answers_of(version)
        stop.set()
    assert min(seen.values()) >= 30
