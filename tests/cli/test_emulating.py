"""What ``--engine emulated`` makes of a local cluster's plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import typer

from starmesh.cli.bench import read_prompts
from starmesh.cli.emulating import Emulating
from starmesh.cli.local_cluster import ClusterPlan
from starmesh.cli.local_options import Predicting
from starmesh.cli.run import CliError
from starmesh.emulation.requests import emulated_prompt

pytestmark = pytest.mark.fast


def flags_of(plan: ClusterPlan) -> dict[str, dict[str, str]]:
    """The flags of each role, by name."""
    return {
        service.role: dict(zip(service.flags[::2], service.flags[1::2], strict=False))
        for service in plan.services("redis://here")
    }


def test_every_service_that_must_know_does(tmp_path: Path) -> None:
    plan = ClusterPlan(
        model=tmp_path, run_directory=tmp_path, engine_flags=("--device", "cuda"), router_flags=("--queue-length", "9")
    )
    emulated = Emulating(engine="emulated", profile="h100-7b", speed=10.0, kv_tokens=5000).apply(plan)
    flags = flags_of(emulated)
    for role, own in flags.items():
        assert (own["--engine"], own["--profile"], own["--speed"]) == ("emulated", "h100-7b", "10.0"), role
        assert own["--kv-tokens"] == "5000"
        assert "--model" not in own and "--device" not in own
    assert flags["router"]["--queue-length"] == "9"
    assert flags["decode"]["--transfer"] == "stream"


def test_times_of_the_hardware_pass_with_it(tmp_path: Path) -> None:
    plan = ClusterPlan(model=None, run_directory=tmp_path)
    slow, fast = (
        flags_of(Emulating(engine="emulated", profile="h100-7b", speed=speed).apply(plan)) for speed in (0.5, 10.0)
    )
    assert float(slow["rescheduler"]["--round-interval-s"]) == 2.0
    assert float(fast["rescheduler"]["--round-interval-s"]) == 0.1
    assert float(slow["rescheduler"]["--cool-down-s"]) == 20 * float(fast["rescheduler"]["--cool-down-s"])
    assert float(fast["decode"]["--report-interval-s"]) == 0.05, "no more than this machine can afford"
    crawling = flags_of(Emulating(engine="emulated", profile="h100-7b", speed=0.01).apply(plan))
    assert float(crawling["decode"]["--report-interval-s"]) == 1.0, "or its lease would run out"
    assert float(crawling["rescheduler"]["--stale-after-s"]) > 2.0


def test_a_model_s_cluster_is_left_as_it_is(tmp_path: Path) -> None:
    plan = ClusterPlan(model=tmp_path, run_directory=tmp_path)
    assert Emulating().apply(plan) == plan
    assert Emulating().interval_s(3.0) == 3.0
    Emulating().check(Predicting(predictor="mine.safetensors"))


@pytest.mark.parametrize(
    ("options", "predictor", "said"),
    [
        ({}, "", "is needed with --engine emulated"),
        ({"profile": "h1000-7b"}, "", "there is no profile 'h1000-7b'"),
        ({"profile": "h100-7b"}, "mine.safetensors", "one of conditional_median, measured, paper, oracle, none"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, str], predictor: str, said: str) -> None:
    with pytest.raises(typer.BadParameter, match=said):
        Emulating(engine="emulated", **options).check(Predicting(predictor=predictor))  # type: ignore[arg-type]


def test_without_predictions_nobody_keeps_what_to_predict_from(tmp_path: Path) -> None:
    emulating = Emulating(engine="emulated", profile="h100-7b")
    plan = ClusterPlan(model=None, run_directory=tmp_path, predictor_flags=Predicting(predictor="oracle").flags)
    flags = flags_of(emulating.apply(plan))
    assert flags["predictor"]["--predictor"] == "oracle"
    assert "--hidden-layers" not in flags["prefill"]
    without = flags_of(emulating.apply(dataclasses.replace(plan, predict=False)))
    assert "predictor" not in without
    assert without["prefill"]["--hidden-layers"] == "none"


def test_a_benchmark_s_lines_may_be_lengths(tmp_path: Path) -> None:
    file = tmp_path / "work.jsonl"
    file.write_text('{"prompt": "Hello"}\n\n{"prompt_tokens": 5, "output_tokens": 9, "arrives_s": 1.5}\n')
    assert read_prompts(str(file)) == ["Hello", emulated_prompt(5, 9, note="line=3")]
    file.write_text('{"prompt_tokens": 5}\n')
    with pytest.raises(CliError, match="line 1: each line"):
        read_prompts(str(file))
