"""Stored samples come back in order, and no split separates what belongs together."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from starmesh.prediction.averaging import averaged
from starmesh.prediction.dataset import folds, load_dataset, split
from starmesh.prediction.shards import ShardDirectory, ShardError, read_manifest, read_sequences
from tests.prediction.samples import LAYOUT, write_samples

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"), 120, samples_per_prompt=3)


def test_rows_are_the_stored_samples(samples: Path) -> None:
    dataset = load_dataset(samples, (3,))
    assert dataset.states.shape[1:] == (1, LAYOUT.width)
    stored = list(read_sequences(samples))
    for number in (0, 7, 119):
        rows = dataset.rows_of(np.array([number]))
        assert dataset.output_tokens[rows].tolist() == stored[number].output_tokens.tolist()
        assert dataset.remaining_tokens[rows].tolist() == stored[number].remaining_tokens.tolist()
        np.testing.assert_array_equal(dataset.states[rows], stored[number].hidden_states[:, [1]])
        average = averaged(stored[number].hidden_states[:, [1]], stored[number].output_tokens)
        np.testing.assert_array_equal(dataset.averages[rows], average.astype(np.float16))
    lengths, finished = dataset.lengths_of(np.arange(120))
    assert lengths.tolist() == [sequence.total_output_tokens for sequence in stored]
    assert finished.tolist() == [sequence.finished for sequence in stored]


def test_splits_keep_the_answers_to_a_prompt_together(samples: Path) -> None:
    dataset = load_dataset(samples, ())
    for parts in (split(dataset, seed=1), *folds(dataset, 4, seed=1)):
        prompts = [set(dataset.prompt[part].tolist()) for part in (parts.train, parts.validation, parts.test)]
        assert all(prompts) and sum(map(len, prompts)) == len(set.union(*prompts)) == 40
    held_out = np.concatenate([parts.test for parts in folds(dataset, 4, seed=1)])
    assert sorted(held_out.tolist()) == list(range(120))
    first, again = split(dataset, seed=1), split(dataset, seed=1)
    assert first.test.tolist() == again.test.tolist() != split(dataset, seed=2).test.tolist()


def test_what_is_held_out_stays_so_while_the_collection_grows(samples: Path, tmp_path: Path) -> None:
    whole = load_dataset(samples, ())
    part = load_dataset(samples, (), most_sequences=60)
    held_out = {whole.request_ids[index] for index in split(whole, seed=1).test}
    assert {part.request_ids[index] for index in split(part, seed=1).test} == held_out & set(part.request_ids)


def test_requests_of_live_traffic_are_each_by_themselves(samples: Path, tmp_path: Path) -> None:
    stored = list(read_sequences(samples))[:20]
    named = [dataclasses.replace(entry, request_id=f"user-{number}") for number, entry in enumerate(stored)]
    ShardDirectory(tmp_path, read_manifest(samples)).write(named)
    dataset = load_dataset(tmp_path, ())
    assert dataset.prompt.tolist() == list(range(20))
    parts = [part.tolist() for part in dataclasses.astuple(split(dataset, seed=3))]
    assert all(parts) and sorted(itertools.chain(*parts)) == list(range(20))


def test_what_was_not_collected_is_refused(samples: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="--hidden-layers 2,5"):
        load_dataset(samples, (2, 5))
    with pytest.raises(ShardError, match="starmesh predictor collect"):
        load_dataset(tmp_path, (3,))
