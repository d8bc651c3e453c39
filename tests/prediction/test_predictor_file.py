"""A predictor survives its file, and a file that is none is refused with what to do."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from starmesh.prediction.batch import SampleBatch
from starmesh.prediction.kinds import COUNT_INPUTS, KINDS
from starmesh.prediction.lengths import bin_edges
from starmesh.prediction.network import Dense, Network
from starmesh.prediction.predictor_file import (
    FORMAT,
    PredictorFileError,
    load_predictor,
    predictor_version,
    read_description,
    read_trained,
    save_predictor,
    shipped_predictor,
    shipped_predictors,
)
from starmesh.types import HiddenLayout

pytestmark = pytest.mark.fast

WIDTH = 6


def network_of(name: str, *, seed: int = 0) -> Network:
    kind = KINDS[name]
    rng = np.random.default_rng(seed)
    layers = kind.depth.layers(9)
    edges = bin_edges(500)
    inputs = WIDTH * len(layers) + (COUNT_INPUTS if kind.counts else 0)
    widths = [inputs, *kind.hidden, len(edges) - 1 if kind.outputs == "bins" else 1]
    dense = tuple(
        Dense(
            rng.normal(size=(after, before)).astype(np.float32) / np.float32(10),
            rng.normal(size=after).astype(np.float32),
        )
        for before, after in itertools.pairwise(widths)
    )
    mean = rng.normal(size=inputs).astype(np.float32)
    scale = rng.uniform(0.5, 2, inputs).astype(np.float32)
    return Network(kind, HiddenLayout("rev-1", layers, WIDTH), mean, scale, dense, edges, 2.5)


def batch_for(network: Network, count: int = 5) -> SampleBatch:
    rng = np.random.default_rng(1)
    states = rng.normal(size=(count, len(network.layout.layers), WIDTH)).astype(np.float16)
    counts = rng.integers(0, 500, size=(2, count))
    return SampleBatch(states, counts[0], counts[1], states.astype(np.float32) / np.float32(2))


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_survives_its_file(name: str, tmp_path: Path) -> None:
    network = network_of(name)
    path = tmp_path / "mine.safetensors"
    save_predictor(network, path, trained={"requests": 7})
    loaded = load_predictor(path)
    assert (loaded.kind, loaded.layout, loaded.parameters) == (name, network.layout, network.parameters)
    assert read_description(path) == network.layout and read_trained(path) == {"requests": 7}
    assert predictor_version(path) == "mine"
    predicted = network.predict(batch_for(network))
    np.testing.assert_array_equal(loaded.predict(batch_for(network)), predicted)
    assert predicted.shape == (5, 2) and np.all(predicted >= 0) and np.all(predicted[:, 1] >= predicted[:, 0])
    save_predictor(network, path, trained={}, half=True)
    np.testing.assert_allclose(load_predictor(path).predict(batch_for(network)), predicted, rtol=0.05, atol=1)


def test_another_shape_of_hidden_states_is_refused() -> None:
    network = network_of("starmesh")
    wide = np.zeros((1, 1, WIDTH + 1), dtype=np.float16)
    zero = np.zeros(1, dtype=np.int64)
    with pytest.raises(ValueError, match=r"not \(1, 6\)"):
        network.predict(SampleBatch(wide, zero, zero))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, metadata: metadata.update(format="other"), FORMAT),
        (lambda tensors, metadata: metadata.update(kind="oracle"), "oracle"),
        (lambda tensors, metadata: metadata.update(layout="[]"), "which samples it takes"),
        (lambda tensors, metadata: metadata.update(layout=json.dumps({"model_revision": "r"})), "which samples"),
        (lambda tensors, metadata: tensors.pop("mean"), "mean"),
        (lambda tensors, metadata: tensors.pop("dense.2.bias"), r"dense\.2\.bias"),
        (lambda tensors, metadata: tensors.update(scale=0 * tensors["scale"]), "does not fit"),
        (lambda tensors, metadata: tensors.update(mean=np.nan * tensors["mean"]), "does not fit"),
        (lambda tensors, metadata: tensors.update(edges=tensors["edges"][::-1].copy()), "does not fit"),
        (lambda tensors, metadata: tensors.update(edges=np.array(3)), "does not fit"),
        (lambda tensors, metadata: tensors.update(edges=np.stack([tensors["edges"]] * 2, axis=1)), "does not fit"),
        (lambda tensors, metadata: tensors.update(mean=tensors["mean"][1:]), "does not fit"),
        (lambda tensors, metadata: tensors.update(upper_ratio=np.array([np.inf])), "does not fit"),
        (lambda tensors, metadata: tensors.update(upper_ratio=np.ones(2)), "no predictor"),
    ],
)
def test_a_broken_file_is_refused(change, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "broken.safetensors"
    network = network_of("starmesh")
    save_predictor(network, path, trained={})
    metadata = {
        "format": FORMAT,
        "kind": "starmesh",
        "layout": json.dumps(dataclasses.asdict(network.layout)),
        "trained": "{}",
    }
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(PredictorFileError, match=said):
        load_predictor(path)


def test_numbers_of_a_type_that_numpy_does_not_have_are_refused(tmp_path: Path) -> None:
    network = network_of("linear")
    path = tmp_path / "strange.safetensors"
    save_predictor(network, path, trained={}, half=True)
    content = path.read_bytes()
    assert content.count(b'"F16"') == 2
    raw = bytearray(content.replace(b'"dtype":"F16"', b'"dtype":"BF16"'))
    raw[:8] = (int.from_bytes(content[:8], "little") + 2).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(PredictorFileError, match="bfloat16"):
        load_predictor(path)


def test_a_state_far_from_all_others_is_answered() -> None:
    network = network_of("starmesh")
    states = np.full((1, 1, WIDTH), -6e4, dtype=np.float16)
    zero = np.zeros(1, dtype=np.int64)
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(network.predict(SampleBatch(states, zero, zero))).all()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PredictorFileError, match="starmesh predictor train"):
        load_predictor(tmp_path / "missing.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(PredictorFileError, match="no safetensors file"):
        load_predictor(tmp_path / "text.safetensors")


def test_what_ships_can_be_used() -> None:
    for path in shipped_predictors():
        loaded = load_predictor(path)
        assert shipped_predictor(loaded.layout.model_revision) == path
        assert path.stat().st_size < 4 << 20 and loaded.parameters <= 2_300_000
        states = np.ones((3, len(loaded.layout.layers), loaded.layout.width), dtype=np.float16)
        counts = np.array([0, 100, 1000])
        predicted = loaded.predict(SampleBatch(states, counts, counts))
        assert np.isfinite(predicted).all() and np.all(predicted[:, 1] >= predicted[:, 0])
    assert shipped_predictor("no such model") is None
