"""Sweeps: every run is done once, by processes that end with whoever started them, and none by code of yesterday."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from starmesh.sim import sweep
from starmesh.sim.config import SimulationConfig, Strategy
from starmesh.sim.result import SimulationResult, config_from_json
from starmesh.sim.sweep import SweepError, SweepProgress, cache_key, run_all
from tests.sim.runs import config_of, result_of

if TYPE_CHECKING:
    from starmesh.sim.run import Progress


def by_hand(config: SimulationConfig, *, progress: Callable[[Progress], None] | None = None) -> SimulationResult:
    """Stands for a simulation; "broken" raises, "killed" takes its process along."""
    if config.strategy.name == "broken":
        raise ValueError("no such thing\nas this")
    if config.strategy.name == "killed":
        os._exit(7)
    return result_of(config)


def forever(config: SimulationConfig, *, progress: Callable[[Progress], None] | None = None) -> SimulationResult:
    """Ends only when nobody listens any more."""
    assert progress is not None
    while True:
        progress(SimpleNamespace(ended_requests=1, requests=2))  # type: ignore[arg-type]
        time.sleep(0.01)


def never(config: SimulationConfig, *, progress: Callable[[Progress], None] | None = None) -> SimulationResult:
    raise AssertionError("it is cached")


CONFIGS = [config_of(name, seed=seed) for name in ("round_robin", "star") for seed in (0, 1)]


def test_results_come_in_order_and_the_second_time_from_the_cache(tmp_path: Path) -> None:
    seen: list[SweepProgress] = []
    found = run_all([*CONFIGS, CONFIGS[0]], processes=2, cache_dir=tmp_path, progress=seen.append, simulate=by_hand)
    assert [result.config for result in found] == [*CONFIGS, CONFIGS[0]]
    assert found[0] == found[-1]
    assert (seen[0].runs, seen[0].done, seen[0].cached, seen[0].fraction) == (4, 0, 0, 0.0)
    assert (seen[-1].done, seen[-1].failed, seen[-1].fraction, seen[-1].running) == (4, 0, 1.0, ())
    assert any("round_robin, 1 requests/s, 3 decode, seed 0" in running for each in seen for running in each.running)
    assert run_all(CONFIGS, cache_dir=tmp_path, simulate=never) == found[:4]


@pytest.mark.fast
def test_what_was_kept_answers_only_for_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("0.0,10,10\n")
    workload = dataclasses.replace(CONFIGS[0].workload, trace_path=str(trace))
    config = dataclasses.replace(CONFIGS[0], workload=workload)
    key = cache_key(config)
    assert cache_key(config) == key != cache_key(CONFIGS[0])
    trace.write_text("0.0,10,11\n")
    assert cache_key(config) != key
    assert cache_key(dataclasses.replace(CONFIGS[0], strategy=Strategy(name="star"))) != cache_key(CONFIGS[0])
    before = cache_key(CONFIGS[0])
    monkeypatch.setattr(sweep, "code_version", lambda: "another")
    assert cache_key(CONFIGS[0]) != before


def test_a_broken_file_in_the_cache_is_made_again(tmp_path: Path) -> None:
    for config, text in zip(CONFIGS, ("", "{}", result_of(CONFIGS[3]).to_json()), strict=False):
        (tmp_path / f"{cache_key(config)}.json").write_text(text)
    with pytest.raises(SweepError, match=r"\(and 2 others\) failed: AssertionError: it is cached"):
        run_all(CONFIGS[:3], cache_dir=tmp_path, simulate=never)


def test_a_failure_names_the_run_and_the_others_are_kept(tmp_path: Path) -> None:
    configs = [config_of("broken"), CONFIGS[0], config_of("killed")]
    with pytest.raises(SweepError) as failed:
        run_all(configs, processes=1, cache_dir=tmp_path, simulate=by_hand)
    said = str(failed.value)
    assert "broken, 1 requests/s, 3 decode, seed 0 (and 1 other) failed: ValueError: no such thing as this;" in said
    path = Path(said.rpartition("starmesh simulate --replay ")[2])
    assert config_from_json(path.read_text()) == configs[0]
    assert run_all([CONFIGS[0]], cache_dir=tmp_path, simulate=never)[0].config == CONFIGS[0]
    with pytest.raises(SweepError, match="its process ended with exit code 7"):
        run_all(configs[2:], simulate=by_hand)


def test_a_process_with_other_code_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "code_version", lambda: "as it was before the edit")
    with pytest.raises(SweepError, match="the code has changed since this sweep began: run it from a clean checkout"):
        run_all(CONFIGS, cache_dir=tmp_path, simulate=by_hand)
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
from starmesh.sim.sweep import run_all
from tests.sim.test_sweep import CONFIGS, forever
if __name__ == "__main__":
    import signal
    # Whatever started the tests may have it ignored, as a shell has for its background jobs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = set()
    def tell(progress):
        # Workers that report have begun.
        if progress.fraction > 0 and not said:
            said.add(print("begun", flush=True))
    try:
        run_all(CONFIGS, processes=2, simulate=forever, progress=tell)
    except KeyboardInterrupt:
        import multiprocessing
        print("left:", multiprocessing.active_children())
"""


def test_ctrl_c_ends_the_processes_without_noise(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == "begun\n"
            os.killpg(process.pid, signal.SIGINT)
            assert process.stdout.read() == "left: []\n"
            assert process.stderr.read() == ""
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
