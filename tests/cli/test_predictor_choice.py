"""Which predictor a cluster of this machine starts with, and what its engines are told of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from starmesh.cli.local_options import ONLINE_PREDICTOR, Predicting
from starmesh.cli.predictor_choice import choose_predictor
from starmesh.cli.run import CliError
from starmesh.model_files import model_revision
from starmesh.prediction.predictor_file import FORMAT
from starmesh.types import HiddenLayout

pytestmark = pytest.mark.fast


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"num_hidden_layers": 9, "hidden_size": 4}')
    return directory


def write_predictor(path: Path, revision: str, layers: tuple[int, ...] = (6,)) -> Path:
    """Only what says what it is: nothing else is read before the predictor service does."""
    layout = json.dumps(dataclasses.asdict(HiddenLayout(revision, layers, 4)))
    save_file({"mean": np.zeros(1, dtype=np.float32)}, path, metadata={"format": FORMAT, "layout": layout})
    return path


def test_a_file_or_a_version_says_who_predicts(tmp_path: Path, model: Path) -> None:
    path = write_predictor(tmp_path / "mine.safetensors", model_revision(model))
    for predicting in (Predicting(predictor=str(path)), Predicting(predictor="mine", directory=tmp_path)):
        assert choose_predictor(predicting, model).description == "remaining tokens are predicted by mine"


@pytest.mark.parametrize(
    ("layers", "flags"),
    [((6,), ()), ((6, 9), ()), ((), ()), ((3,), ("--hidden-layers", "3,6,9")), ((3, 9), ("--hidden-layers", "3,6,9"))],
)
def test_engines_keep_what_it_looks_at_beside_their_default(
    tmp_path: Path, model: Path, layers: tuple[int, ...], flags: tuple[str, ...]
) -> None:
    path = write_predictor(tmp_path / "mine.safetensors", model_revision(model), layers)
    assert choose_predictor(Predicting(predictor=str(path)), model).engine_flags == flags


def test_without_a_file_the_engines_keep_their_default(model: Path) -> None:
    for predicting in (Predicting(), Predicting(predictor=ONLINE_PREDICTOR)):  # none ships for this model
        choice = choose_predictor(predicting, model)
        assert choice.engine_flags == ()
        assert ONLINE_PREDICTOR in choice.description
    assert "nobody predicts" in choose_predictor(Predicting(predictor="none"), model).description


def test_what_cannot_answer_is_told_before_anything_starts(tmp_path: Path, model: Path) -> None:
    other = write_predictor(tmp_path / "other.safetensors", "another-revision")
    with pytest.raises(CliError, match="is a predictor of another model than model"):
        choose_predictor(Predicting(predictor=str(other)), model)
    with pytest.raises(CliError, match=r"there is no predictor 'nosuch': .*other, conditional_median"):
        choose_predictor(Predicting(predictor="nosuch", directory=tmp_path), model)
    with pytest.raises(CliError, match=r"missing\.safetensors"):
        choose_predictor(Predicting(predictor="missing.safetensors"), model)
    (tmp_path / "broken.safetensors").write_text("no tensors")
    with pytest.raises(CliError, match=r"broken\.safetensors"):
        choose_predictor(Predicting(predictor=str(tmp_path / "broken.safetensors")), model)
