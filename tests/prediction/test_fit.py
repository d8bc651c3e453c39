"""Training learns what is there, twice the same, and serving computes what training did."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from starmesh.prediction.dataset import load_dataset, split
from starmesh.prediction.evaluation import HeldOut
from starmesh.prediction.kinds import KINDS
from starmesh.prediction.training import references
from starmesh.prediction.training.command import evaluate, train
from starmesh.prediction.training.fit import Progress, config_for, fit
from starmesh.prediction.training.models import MODELS, Material
from tests.prediction.samples import CAP, write_samples

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"), 500)


@pytest.mark.parametrize("name", ["linear", "mlp", "starmesh"])
def test_every_kind_beats_what_sees_no_state(name: str, samples: Path) -> None:
    dataset = load_dataset(samples, KINDS[name].depth.layers(3))
    parts = split(dataset, seed=0)
    # The paper's network is large; a smaller one of its kind learns the same here.
    kind = replace(KINDS[name], hidden=KINDS[name].hidden and (64, 32))
    # Without dropout, which spreads the distributions wider than these clear signals deserve.
    config = replace(config_for(KINDS[name], epochs=40), learning_rate=5e-3, state_dropout=0.0, dropout=0.0)
    fitted = fit(dataset, parts, kind, config)
    rows = dataset.rows_of(parts.test)
    held_out = HeldOut(dataset, rows, limit_tokens=CAP)
    predicted = fitted.network.predict(dataset.batch(rows))
    reference = references.conditional(dataset, parts)(rows)
    assert held_out.ratio(predicted, reference).high < 0.95
    assert 0.8 < held_out.scores(predicted).coverage.value < 0.98


def test_the_same_seed_gives_the_same_weights(samples: Path) -> None:
    dataset = load_dataset(samples, (2,))
    parts = split(dataset, seed=0)
    epochs: list[Progress] = []
    networks = [
        fit(
            dataset,
            parts,
            KINDS["starmesh"],
            config_for(KINDS["starmesh"], seed=seed, epochs=2),
            on_epoch=epochs.append,
        )
        for seed in (3, 3, 4)
    ]
    first, again, other = (found.network.dense[0].weight for found in networks)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert [at.epoch for at in epochs[:2]] == [1, 2]


def test_training_stops_early_and_keeps_the_best(samples: Path) -> None:
    dataset = load_dataset(samples, (3,))
    losses: list[float] = []
    config = replace(config_for(KINDS["linear"]), epochs=60, patience=3, learning_rate=0.3)
    fitted = fit(dataset, split(dataset, seed=0), KINDS["linear"], config, on_epoch=lambda at: losses.append(at.loss))
    assert fitted.loss == min(losses) == losses[fitted.epoch - 1]
    assert len(losses) == min(60, fitted.epoch + 3)


def test_cut_sequences_teach_that_they_went_on(samples: Path) -> None:
    """With the cut ones taken for finished, the predicted quantile of long sequences would end at the cap."""
    dataset = load_dataset(samples, (2,))
    parts = split(dataset, seed=0)
    long = dataset.rows_of(np.arange(500))
    long = long[~dataset.finished[long]]
    predicted = []
    for finished in (dataset.finished, np.ones_like(dataset.finished)):
        fitted = fit(
            replace(dataset, finished=finished), parts, KINDS["starmesh"], config_for(KINDS["starmesh"], epochs=25)
        )
        predicted.append(fitted.network.predict(dataset.batch(long))[:, 1].mean())
    assert predicted[0] > predicted[1]


def test_prompt_only_references_do_not_look_again(samples: Path) -> None:
    dataset = load_dataset(samples, (2,))
    parts = split(dataset, seed=0)
    model = references.prompt_state(dataset, parts, replace(config_for(KINDS["starmesh"], epochs=10), batch_samples=64))
    rows = dataset.rows_of(parts.test[:5])
    for sequence in parts.test[:5]:
        its = rows[dataset.sequence[rows] == sequence]
        fixed, left = model.fixed(its), model.minus_elapsed(its)
        assert np.ptp(fixed[:, 0]) == 0
        np.testing.assert_allclose(left[:, 0], np.maximum(fixed[:, 0] - dataset.output_tokens[its], 0), atol=1e-3)
        given = model.given_elapsed(its)
        assert np.all(given >= left - 1e-3)
        np.testing.assert_allclose(given[0], fixed[0], rtol=1e-5)


def test_bags_of_tokens_tell_prompts_apart(samples: Path) -> None:
    dataset = load_dataset(samples, (2,))
    # A prompt that says how long the answer is.
    prompts = [[1, 2, 10 + int(np.log2(total))] for total in dataset.total_tokens]
    material = Material({(2,): dataset}, prompts=prompts)
    parts = split(dataset, seed=0)
    rows = dataset.rows_of(parts.test)
    rows = rows[dataset.output_tokens[rows] == 0]
    held_out = HeldOut(dataset, rows, limit_tokens=CAP)
    bag = MODELS["prompt_bag"](material, parts).predict(rows)
    assert held_out.ratio(bag, references.constant(dataset, parts)(rows)).value < 0.6


def test_from_samples_to_a_scored_file(samples: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    path = train(
        console, directory=samples, kind="starmesh", out=tmp_path / "v1.safetensors", seed=0, device="cpu", epochs=3
    )
    evaluate(console, directory=samples, predictor=path, seed=0)
    said = console.export_text()
    parts = split(load_dataset(samples, ()), seed=0)
    assert f"{len(parts.train)} to learn from" in said and f"{len(parts.test)} held out" in said
    assert "starmesh up --predictor" in said
    assert said.count("conditional_median") == 2 and said.count("v1") >= 2
    with pytest.raises(ValueError, match="no kind of predictor is named 'oracle'"):
        train(console, directory=samples, kind="oracle", out=None, seed=0, device="cpu", epochs=3)
