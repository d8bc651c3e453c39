"""``starmesh predictor train`` and ``evaluate``, on a few samples made up."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from starmesh.cli.app import app
from starmesh.cli.predictor_commands import Kind
from starmesh.prediction.kinds import KINDS
from starmesh.prediction.predictor_file import load_predictor
from starmesh.prediction.shards import Manifest, SampledSequence, ShardDirectory
from starmesh.types import HiddenLayout

WIDTH = 4


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 sequences, the first number of whose states tells what is still to come."""
    directory = tmp_path_factory.mktemp("samples")
    layout = HiddenLayout("revision", (2, 3), WIDTH)
    shards = ShardDirectory(directory, Manifest(layout=layout, model="tiny", dtype="float32", every_tokens=20))
    draw = np.random.default_rng(0)
    sequences = []
    for number in range(60):
        total = int(draw.integers(30, 200))
        positions = np.arange(0, total, 20, dtype=np.int32)
        states = draw.normal(size=(len(positions), 2, WIDTH)).astype(np.float16)
        states[:, :, 0] = ((total - positions) / 100)[:, None]
        sequences.append(SampledSequence(f"p{number}-0", 10, total, True, positions, states))
    shards.write(sequences)
    return directory


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predictor", *map(str, arguments)])


def test_the_kinds_are_those_that_can_be_trained() -> None:
    assert set(get_args(Kind)) == set(KINDS)


def test_a_predictor_is_trained_and_scored(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    trained = invoke("train", samples, "--kind", "linear", "--out", out, "--epochs", 2)
    assert trained.exit_code == 0, trained.output
    assert f"starmesh up --predictor {out}" in trained.output.replace("\n", "")
    assert load_predictor(out).kind == "linear"
    scored = invoke("evaluate", samples, "--predictor", out)
    assert scored.exit_code == 0, scored.output
    assert "12 requests held out" in scored.output
    assert "mine" in scored.output


def test_what_cannot_be_done_is_one_line(samples: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (["train", tmp_path / "nowhere"], "no samples were collected there"),
        (["evaluate", samples], "none ships for tiny; name one with --predictor"),
        (["evaluate", samples, "--predictor", tmp_path / "none.safetensors"], "none.safetensors"),
        (["train", samples, "--kind", "linear", "--out", tmp_path / "no" / "x.safetensors", "--epochs", 1], "No such"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1, result.output
        assert said in result.stderr
        assert result.stderr.startswith("starmesh: ")
        assert result.stderr.count("\n") == 1
