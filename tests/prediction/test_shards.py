"""Samples on disk: what is written is read, what does not fit is refused, nothing is half there."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from starmesh.prediction.shards import (
    MANIFEST,
    MAX_SHARD_SEQUENCES,
    Manifest,
    SampledSequence,
    ShardDirectory,
    ShardError,
    StoredSequence,
    read_manifest,
    read_sequences,
    read_stored,
    shard_paths,
)
from starmesh.types import HiddenLayout

pytestmark = pytest.mark.fast

LAYOUT = HiddenLayout("rev", (1, 2), 3)
KIND = Manifest(layout=LAYOUT, model="tiny", dtype="float32", every_tokens=20, sampling={"temperature": 0.7})


def sampled(name: str, total: int = 50, samples: int = 3, *, finished: bool = True, seed: int = 0) -> SampledSequence:
    states = np.random.default_rng(seed).normal(size=(samples, 2, 3)).astype(np.float16)
    positions = np.arange(samples, dtype=np.int32) * 20
    return SampledSequence(name, 7, total, finished, positions, states)


def same(left: SampledSequence, right: SampledSequence) -> bool:
    return all(
        np.array_equal(getattr(left, field.name), getattr(right, field.name))
        for field in dataclasses.fields(SampledSequence)
    )


SEQUENCES = st.lists(
    st.builds(
        sampled,
        st.text("abc.:-_09", min_size=1, max_size=8),
        st.integers(0, 1 << 20),
        st.integers(0, 5),
        finished=st.booleans(),
        seed=st.integers(0, 9),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30)
@given(st.lists(SEQUENCES, min_size=1, max_size=3))
def test_what_is_written_is_read(shards: list[list[SampledSequence]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "samples"
        writer = ShardDirectory(directory, KIND)
        paths = [writer.write(sequences) for sequences in shards]
        written = [sequence for sequences in shards for sequence in sequences]
        read = list(read_sequences(directory))
        assert len(read) == len(written) and all(map(same, read, written))
        assert read_stored(directory) == [
            StoredSequence(s.request_id, s.total_output_tokens, s.finished, len(s.output_tokens)) for s in written
        ]
        assert shard_paths(directory) == paths
        assert read_manifest(directory) == KIND


def test_the_label_is_what_was_still_to_come() -> None:
    assert sampled("a", total=50).remaining_tokens.tolist() == [50, 30, 10]


def test_another_process_goes_on_after_the_last_shard(tmp_path: Path) -> None:
    ShardDirectory(tmp_path, KIND).write([sampled("a")])
    first = shard_paths(tmp_path)[0]
    ShardDirectory(tmp_path, KIND).write([sampled("b")])
    assert [path.name for path in shard_paths(tmp_path)] == ["shard-000000.safetensors", "shard-000001.safetensors"]
    first.unlink()
    ShardDirectory(tmp_path, KIND).write([sampled("c")])
    assert [sequence.request_id for sequence in read_sequences(tmp_path)] == ["b", "c"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"layout": HiddenLayout("other", (1, 2), 3)}, "layout"),
        ({"dtype": "bfloat16"}, "dtype bfloat16 and not float32|dtype float32 and not bfloat16"),
        ({"every_tokens": 10}, "every_tokens"),
        ({"sampling": {"temperature": 1.0}}, "sampling"),
    ],
)
def test_samples_of_another_kind_are_not_mixed_in(tmp_path: Path, changed: dict[str, object], named: str) -> None:
    ShardDirectory(tmp_path, KIND)
    with pytest.raises(ShardError, match=named):
        ShardDirectory(tmp_path, dataclasses.replace(KIND, **changed))  # type: ignore[arg-type]


def test_a_shard_has_sequences_of_its_layout_and_not_too_many(tmp_path: Path) -> None:
    writer = ShardDirectory(tmp_path, KIND)
    with pytest.raises(ShardError, match="1 to"):
        writer.write([])
    with pytest.raises(ShardError, match="1 to"):
        writer.write([sampled("a", samples=0)] * (MAX_SHARD_SEQUENCES + 1))
    wide = dataclasses.replace(sampled("a"), hidden_states=np.zeros((3, 2, 4), dtype=np.float16))
    with pytest.raises(ShardError, match=r"\[2, 3\]"):
        writer.write([wide])
    assert shard_paths(tmp_path) == []


def test_a_directory_without_samples_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="predictor collect"):
        list(read_sequences(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layout": {}}', '{"layout": {"layers": 3}}', "nothing"])
def test_a_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ShardError, match=MANIFEST):
        read_manifest(tmp_path)
    with pytest.raises(ShardError, match=MANIFEST):
        ShardDirectory(tmp_path, KIND)


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    path = ShardDirectory(tmp_path, KIND).write([sampled("a")])
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"\xff" * 100):
        path.write_bytes(broken)
        for read in (lambda: list(read_sequences(tmp_path)), lambda: read_stored(tmp_path)):
            with pytest.raises(ShardError, match=f"{path.name} cannot be read"):
                read()


def test_a_shard_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = ShardDirectory(tmp_path, KIND).write([sampled("a"), sampled("b")])
    tensors = load_file(path)
    with safe_open(path, framework="numpy") as shard:
        metadata = dict(shard.metadata())
    changes = [
        ({"hidden_states": tensors["hidden_states"][:, :1]}, metadata, "fit its manifest"),
        ({"hidden_states": tensors["hidden_states"][:2]}, metadata, "fit its manifest"),
        ({"sample_counts": np.array([7, -1], dtype=np.int32)}, metadata, "fit its manifest"),
        ({"sample_counts": np.array([1, 1], dtype=np.int32)}, metadata, "fit its manifest"),
        ({}, {"request_ids": json.dumps(["a"])}, "fit its manifest"),
        ({}, {"other": ""}, "names no requests"),
    ]
    for columns, told, named in changes:
        save_file(tensors | columns, path, metadata=told)
        with pytest.raises(ShardError, match=named):
            list(read_sequences(tmp_path))
    save_file({"sample_counts": tensors["sample_counts"]}, path, metadata=metadata)
    with pytest.raises(ShardError, match="lacks"):
        list(read_sequences(tmp_path))
    with pytest.raises(ShardError, match="lacks"):
        read_stored(tmp_path)


def test_a_copy_is_no_shard(tmp_path: Path) -> None:
    shards = ShardDirectory(tmp_path, KIND)
    first = shards.write([sampled("a")])
    (tmp_path / "shard-copy.safetensors").write_bytes(first.read_bytes())
    assert shards.write([sampled("b")]).name == "shard-000001.safetensors"
    assert [sequence.request_id for sequence in read_sequences(tmp_path)] == ["a", "b"]


def test_an_interrupted_write_leaves_no_shard(tmp_path: Path) -> None:
    ShardDirectory(tmp_path, KIND)
    (tmp_path / ".shard-000000.safetensors.17").write_bytes(b"half")
    assert list(read_sequences(tmp_path)) == []
