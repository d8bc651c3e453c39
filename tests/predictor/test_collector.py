"""Collection: what was sent is stored, labelled, readable, bounded, and gone on with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from services.predictor.collector import SHARD_SEQUENCES, Collector, open_collector
from services.predictor.intake import End, Samples
from starmesh.prediction.shards import (
    Manifest,
    SampledSequence,
    ShardDirectory,
    ShardError,
    read_manifest,
    read_sequences,
    shard_paths,
)
from starmesh.types import HiddenLayout
from starmesh.v1 import sequence_pb2
from tests.predictor.conftest import serving, until
from tests.predictor.predictors import LAYOUT, Echo, end, request, sample

MANY = 1 << 30


def samples_of(name: str, positions: Sequence[int], *, layout: HiddenLayout = LAYOUT, prompt: int = 5) -> Samples:
    shape = (len(positions), len(layout.layers), layout.width)
    states = np.repeat(np.array(positions, dtype=np.float16), shape[1] * shape[2]).reshape(shape)
    counts = np.array(positions, dtype=np.int64)
    return Samples(
        layout, (name,) * len(positions), states, np.full(len(positions), prompt), counts, ("",) * len(positions)
    )


def stored(directory: Path) -> dict[str, SampledSequence]:
    return {sequence.request_id: sequence for sequence in read_sequences(directory)}


def collect(collector: Collector, name: str, total: int, *, finished: bool = True) -> None:
    collector.take(samples_of(name, range(0, total, 20)))
    collector.end(End(name, total, finished))


async def test_live_traffic_is_stored_and_labelled(tmp_path: Path) -> None:
    directory = tmp_path / "samples"
    async with serving(Echo(), collect=directory) as running:
        await running.predict(request([sample("a", 0, 1), sample("b", 0, 2)]))
        await running.predict(request([sample("a", 20, 3), sample("running", 0, 9)]))
        await running.predict(request([sample("b", 20, 4)], [end("a", 37)]))
        await running.predict(request(ends=[end("b", 25, sequence_pb2.FINISH_REASON_LENGTH), end("unknown", 4)]))
        await running.predict(request([sample("gone")], [end("gone", 3, sequence_pb2.FINISH_REASON_CANCELLED)]))
        assert (await running.status()).collected_samples == 4
    found = stored(directory)
    assert set(found) == {"a", "b"}
    assert (found["a"].finished, found["a"].total_output_tokens, found["a"].prompt_tokens) == (True, 37, 5)
    assert (found["b"].finished, found["b"].total_output_tokens) == (False, 25)
    assert found["a"].output_tokens.tolist() == found["b"].output_tokens.tolist() == [0, 20]
    assert found["a"].hidden_states[:, 0, 0].tolist() == [1, 3]
    assert read_manifest(directory).layout == LAYOUT


async def test_nothing_is_stored_unless_asked_for(tmp_path: Path) -> None:
    async with serving(Echo()) as running:
        await running.predict(request([sample("a", 0, 1)], [end("a", 30)]))
        assert (await running.status()).collected_samples == 0


async def test_a_full_shard_is_written_at_once(tmp_path: Path) -> None:
    collector = await open_collector(tmp_path, max_bytes=MANY)
    for number in range(SHARD_SEQUENCES):
        collect(collector, f"r{number}", 30)
    await until(lambda: collector.bytes)
    assert len(stored(tmp_path)) == SHARD_SEQUENCES
    await collector.close()
    assert len(shard_paths(tmp_path)) == 1


async def test_it_goes_on_where_another_ended(tmp_path: Path) -> None:
    first = await open_collector(tmp_path, max_bytes=MANY)
    collect(first, "a", 50)
    await first.close()
    second = await open_collector(tmp_path, max_bytes=MANY)
    assert (second.samples, second.bytes) == (first.samples, first.bytes) == (3, second.bytes)
    collect(second, "b", 30)
    await second.close()
    assert second.samples == 5 and second.bytes > first.bytes
    assert set(stored(tmp_path)) == {"a", "b"}


async def test_it_ends_at_its_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bound = 100_000
    collector = await open_collector(tmp_path / "bounded", max_bytes=bound)
    for batch in range(12):
        for number in range(SHARD_SEQUENCES):
            collect(collector, f"r{batch}-{number}".ljust(128, "x"), 20)
        await until(lambda: not collector._ended)
    await until(lambda: not collector.collecting)
    collect(collector, "late", 30)
    await collector.close()
    assert bound / 2 < collector.bytes <= bound
    assert collector.bytes == sum(path.stat().st_size for path in shard_paths(tmp_path / "bounded"))
    assert sum(len(sequence.output_tokens) for sequence in stored(tmp_path / "bounded").values()) == collector.samples
    assert caplog.text.count("--collect-max-mib") == 1


async def test_a_full_disk_ends_the_collection_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "samples"
    async with serving(Echo(), collect=directory) as running:
        directory.rmdir()
        directory.write_text("in the way")
        for number in range(SHARD_SEQUENCES):
            await running.predict(request([sample(f"r{number}")], [end(f"r{number}", 5)]))
        await until(lambda: "ends:" in caplog.text)
        assert (await running.predict(request([sample("a", 0, 1)]))).estimates
        assert (await running.status()).collected_samples == 0


async def test_a_bug_ends_the_collection_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(directory: ShardDirectory, sequences: Sequence[SampledSequence]) -> Path:
        raise TypeError("no such thing")

    monkeypatch.setattr(ShardDirectory, "write", write)
    collector = await open_collector(tmp_path, max_bytes=MANY)
    collect(collector, "a", 50)
    await collector.close()
    assert "no such thing" in caplog.text and collector.samples == 0


async def test_a_prepared_directory_keeps_its_manifest(tmp_path: Path) -> None:
    prepared = Manifest(layout=LAYOUT, model="tiny", dtype="float32", every_tokens=20, max_output_tokens=64)
    ShardDirectory(tmp_path, prepared)
    collector = await open_collector(tmp_path, max_bytes=MANY)
    collect(collector, "a", 30)
    await collector.close()
    assert read_manifest(tmp_path) == prepared and set(stored(tmp_path)) == {"a"}


async def test_samples_of_another_model_are_not_mixed_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = dataclasses.replace(LAYOUT, model_revision="rev-2")
    collector = await open_collector(tmp_path, max_bytes=MANY)
    collect(collector, "a", 30)
    collector.take(samples_of("b", [0], layout=other))
    collector.end(End("b", 10, True))
    await collector.close()
    assert set(stored(tmp_path)) == {"a"}
    again = await open_collector(tmp_path, max_bytes=MANY)
    again.take(samples_of("c", [0], layout=other))
    again.end(End("c", 10, True))
    await again.close()
    assert set(stored(tmp_path)) == {"a"} and "use another directory" in caplog.text


async def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ShardError, match="manifest"):
        await open_collector(tmp_path, max_bytes=MANY)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard-000000.safetensors").write_text("nothing")
    with pytest.raises(ShardError, match="remove it"):
        await open_collector(tmp_path, max_bytes=MANY)


async def test_what_is_gathered_is_bounded(tmp_path: Path) -> None:
    collector = await open_collector(tmp_path, max_bytes=MANY, running_bytes=4000)
    for number in range(50):
        collector.take(samples_of(f"r{number}", [0, 20]))
        collector.take(samples_of("kept", [20 * number]))
        assert collector._running_bytes <= 4000
    for name in ("r0", "r49", "kept"):
        collector.end(End(name, 2000, True))
    assert collector._running_bytes == sum(known.bytes for known in collector._running.values())
    await collector.close()
    # One alone that is too long goes too, and is gathered again from there.
    found = stored(tmp_path)
    assert set(found) == {"r49", "kept"} and 0 < len(found["kept"].output_tokens) < 20


async def test_a_sequence_that_went_back_replaces_its_samples(tmp_path: Path) -> None:
    collector = await open_collector(tmp_path, max_bytes=MANY)
    collector.take(samples_of("a", [0, 20, 40, 60]))
    collector.take(samples_of("a", [40]))
    collector.take(samples_of("a", [0]))
    collector.take(samples_of("a", [20, 100]))
    collector.end(End("a", 90, True))
    collector.take(samples_of("b", [0, 20]))
    collector.take(samples_of("b", [40], prompt=6))
    collector.end(End("b", 90, True))
    assert collector._running_bytes == 0
    await collector.close()
    found = stored(tmp_path)
    assert found["a"].output_tokens.tolist() == [0, 20]
    assert (found["b"].output_tokens.tolist(), found["b"].prompt_tokens) == ([40], 6)
