"""What a collection asks for, what it leaves out, and what it says of itself."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from starmesh.cli.app import app
from starmesh.cli.collect_report import lengths_summary, progress_line, run_summary, span, stored_summary
from starmesh.cli.collection import (
    CollectionRequest,
    digest,
    layers_flag,
    left_out,
    manifest_of,
    plan_requests,
    prepare,
)
from starmesh.cli.collection_run import Tally
from starmesh.cli.run import CliError
from starmesh.model_files import model_revision
from starmesh.prediction.kinds import KINDS
from starmesh.prediction.shards import Manifest, SampledSequence, ShardDirectory, read_manifest, read_stored
from starmesh.types import HiddenLayout
from starmesh.v1 import inference_pb2, sequence_pb2

pytestmark = pytest.mark.fast


def text_of(what: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def prompts(count: int) -> list[str]:
    return [f"prompt {number}" for number in range(count)]


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 100), st.integers(1, 100), st.integers(0, 5))
def test_more_requests_ask_for_all_that_fewer_do(count: int, samples: int, few: int, more: int, seed: int) -> None:
    def ids(requests: int | None) -> list[str]:
        planned = plan_requests(prompts(count), requests=requests, samples_per_prompt=samples, seed=seed)
        assert all(request.prompt == f"prompt {request.request_id[1:].split('-')[0]}" for request in planned)
        return [request.request_id for request in planned]

    few, more = sorted((few, more))
    assert set(ids(few)) <= set(ids(more)) <= set(ids(None))
    assert len(ids(few)) == len(set(ids(few))) == min(few, count * samples)
    assert len(set(ids(None))) == count * samples


def test_every_prompt_comes_once_before_any_comes_twice() -> None:
    planned = plan_requests(prompts(10), requests=8, samples_per_prompt=3, seed=1)
    # Three answers each: three prompts are enough, of which the last is asked twice.
    assert [request.request_id.split("-")[1] for request in planned] == list("00011122")
    assert len({request.prompt for request in planned}) == 3


def test_the_order_is_the_seeds() -> None:
    def ids(seed: int) -> list[str]:
        planned = plan_requests(prompts(30), requests=None, samples_per_prompt=1, seed=seed)
        return [request.request_id for request in planned]

    assert ids(0) == ids(0) != ids(1)
    assert sorted(ids(0)) == sorted(ids(1))


def test_the_sampling_is_seeded_by_the_name_alone() -> None:
    # Written down: samples of an earlier version must be had again.
    assert CollectionRequest("p12-0", "any").seed == CollectionRequest("p12-0", "other").seed == 3827116464
    assert len({CollectionRequest(f"p0-{sample}", "any").seed for sample in range(100)}) == 100
    assert all(0 <= CollectionRequest(f"p{index}-0", "any").seed < 2**32 for index in range(100))


def test_what_is_stored_is_left_out() -> None:
    planned = plan_requests(prompts(4), requests=None, samples_per_prompt=2, seed=0)
    left = left_out(planned, {"p0-0", "p3-1", "other"})
    assert {request.request_id for request in planned} - {request.request_id for request in left} == {"p0-0", "p3-1"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"num_hidden_layers": 5, "hidden_size": 4}')
    return directory


def manifest(model: Path, *, layers: str = "", temperature: float = 0.7) -> Manifest:
    return manifest_of(
        model,
        hidden_layers=layers,
        every_tokens=20,
        dtype="float32",
        max_output_tokens=64,
        temperature=temperature,
    )


def test_the_manifest_says_what_samples_are_of(model: Path) -> None:
    found = manifest(model)
    # Two thirds up, and the last: what the kinds of predictors look at.
    assert found.layout == HiddenLayout(model_revision(model), (3, 5), 4)
    assert all(set(kind.depth.layers(5)) <= {3, 5} for kind in KINDS.values())
    assert layers_flag(found) == "3,5"
    assert (found.model, found.sampling, found.max_output_tokens) == ("model", {"temperature": 0.7}, 64)
    assert manifest(model, layers="5,1,1").layout.layers == (1, 5)
    for wrong in ("0", "6", "none", "1,,2"):
        with pytest.raises(CliError, match="give some of 1 to 5"):
            manifest(model, layers=wrong)


def test_sizes_are_those_of_the_text_model(model: Path) -> None:
    (model / "config.json").write_text('{"text_config": {"num_hidden_layers": 1, "hidden_size": 8}}')
    assert (manifest(model).layout.layers, manifest(model).layout.width) == ((1,), 8)
    (model / "config.json").write_text("{}")
    with pytest.raises(CliError, match="does not tell the layers"):
        manifest(model)


def test_a_directory_keeps_to_one_collection(tmp_path: Path, model: Path) -> None:
    directory = tmp_path / "new" / "samples"
    prepare(directory, manifest(model), "ab12")
    prepare(directory, manifest(model), "ab12")
    assert read_manifest(directory) == manifest(model)
    with pytest.raises(CliError, match="answers to other prompts; give another --out"):
        prepare(directory, manifest(model), "ab13")
    with pytest.raises(CliError, match=r"temperature.*use another directory"):
        prepare(directory, manifest(model, temperature=1.0), "ab12")
    (tmp_path / "file").touch()
    with pytest.raises(CliError, match="give another --out"):
        prepare(tmp_path / "file", manifest(model), "ab12")


def test_prompts_are_told_apart_by_their_text() -> None:
    assert digest(["a", "b"]) == digest(("a", "b")) != digest(["a b"]) != digest(["b", "a"])


def ending(reason: sequence_pb2.FinishReason.ValueType, tokens: int) -> inference_pb2.GenerateResponse:
    response = inference_pb2.GenerateResponse(finish_reason=reason)
    response.usage.output_tokens = tokens
    return response


def test_a_request_counts_by_how_it_ended() -> None:
    tally = Tally(5, 64)
    tally.add_end("a", ending(sequence_pb2.FINISH_REASON_STOP, 10))
    tally.add_end("b", ending(sequence_pb2.FINISH_REASON_LENGTH, 64))
    tally.add_end("c", ending(sequence_pb2.FINISH_REASON_CANCELLED, 3))
    tally.add_failure("d: too long")
    assert (tally.finished, tally.cut, tally.failed, tally.done) == (1, 1, 2, 4)
    assert (tally.lengths, tally.ended) == ([10, 64], ["a", "b"])
    shown = text_of(run_summary(tally))
    assert "4 of 5 requests, 1 finished, 1 cut, 2 failed" in shown
    assert "the first that failed: cancelled by the cluster" in shown


def test_the_rate_is_that_of_the_last_half_minute() -> None:
    tally = Tally(10, 1000)
    assert (tally.tokens_per_s, tally.left_s) == (0.0, None)
    for second in range(101):
        tally.output_tokens = 10 * min(second, 50) + 40 * max(0, second - 50)
        tally.mark(float(second))
    assert tally.tokens_per_s == pytest.approx(40)
    tally.lengths, tally.finished = [300, 500], 2
    # 2,500 tokens for two ends: 1,250 each for the other eight, but no more than 1,000, of which 1,700 are there.
    assert tally.left_s == pytest.approx((8 * 1000 - 1700) / 40)
    tally.max_output_tokens = 10_000
    assert tally.left_s == pytest.approx(8 * 1250 / 40)
    assert progress_line(tally) == "2 of 10 requests, 2 finished, 0 cut, 40 tokens/s, about 4 min left"
    assert progress_line(tally, counted=True).startswith("2 finished")


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0 s"), (99.4, "99 s"), (600, "10 min"), (11_100, "3 h 05 min")])
def test_times_are_for_people(seconds: float, shown: str) -> None:
    assert span(seconds) == shown


def test_too_many_cut_answers_are_warned_of() -> None:
    assert "--max-output-tokens" not in text_of(lengths_summary([10] * 20, 3))
    shown = text_of(lengths_summary([10] * 20, 4))
    assert "4, 20.0%" in shown
    assert "more than 15% were cut, and have no label: collect with a higher --max-output-tokens" in shown
    assert "0, 0.0%" in text_of(lengths_summary([], 0))


def test_the_summary_is_of_all_that_is_stored(tmp_path: Path) -> None:
    layout = HiddenLayout("r", (1, 2), 4)
    shards = ShardDirectory(tmp_path, Manifest(layout=layout, model="tiny", dtype="float32", every_tokens=20))
    for number, finished in enumerate([True, False]):
        states = np.zeros((3, 2, 4), dtype=np.float16)
        positions = np.array([0, 20, 40], dtype=np.int32)
        shards.write([SampledSequence(f"p{number}-0", 5, 50 + number, finished, positions, states)])
    stored = read_stored(tmp_path)
    assert [(each.request_id, each.total_output_tokens, each.finished, each.samples) for each in stored] == [
        ("p0-0", 50, True, 3),
        ("p1-0", 51, False, 3),
    ]
    shown = text_of(stored_summary(Path("here"), stored, 3 << 20))
    assert "2 requests, 6 samples, 3.0 MiB in here" in shown
    assert "1, 50.0%" in shown
    assert "longest 51" in shown
    assert read_stored(tmp_path / "missing") == []


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["predictor", "collect", *arguments])
    return result.exit_code, result.stderr


def test_a_bad_prompt_file_is_named_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n{}\n")
    code, said = invoke(str(path), "--out", str(tmp_path / "out"))
    assert code == 1
    assert "prompts.jsonl, line 2: each line must be an object" in said
    path.write_text("")
    assert "has no prompts" in invoke(str(path), "--out", str(tmp_path / "out"))[1]
    assert not (tmp_path / "out").exists()


def test_it_must_be_said_where_samples_go(tmp_path: Path) -> None:
    code, said = invoke(str(tmp_path / "prompts.jsonl"))
    assert code == 2
    assert "--out" in said
