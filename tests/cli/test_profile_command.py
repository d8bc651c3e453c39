"""``starmesh profile``: what it refuses, what it shows, and one measurement of a tiny model from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from starmesh.cli.app import app
from starmesh.cli.emulating import Emulating
from starmesh.cli.local_cluster import ClusterPlan
from starmesh.cli.local_options import Predicting
from starmesh.cli.profile_command import show_profile, show_steps
from starmesh.instance.measuring.steps import MeasuredSteps
from starmesh.profiles import load_profile, write_profile
from starmesh.profiles.fit import StepTime, fit_steps
from starmesh.profiles.profile_file import number_names

runner = CliRunner()


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "profile.json"],
        ["--out", "no/such/directory/mine.toml"],
        ["--seconds", "0"],
        ["--max-sequences", "64", "--max-step-tokens", "32"],
        ["--dtype", "int4"],
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runner.invoke(app, ["profile", *arguments]).exit_code == 2


@pytest.mark.fast
def test_a_model_that_is_nowhere_is_one_line() -> None:
    result = runner.invoke(app, ["profile", "--model", "nowhere"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


@pytest.mark.fast
def test_a_cluster_with_a_model_reckons_with_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_profile(load_profile("h100-7b"), Path("mine.toml"))
    for profile, flag in (("h100-7b", "h100-7b"), ("mine.toml", str(tmp_path / "mine.toml"))):
        emulating = Emulating(profile=profile)
        emulating.check(Predicting())
        plan = emulating.apply(ClusterPlan(model=tmp_path, run_directory=tmp_path))
        for flags in (plan.decode_flags, plan.rescheduler_flags):
            assert flags == ("--profile", flag)
    assert Emulating().apply(plan) == plan
    with pytest.raises(typer.BadParameter, match="no profile 'abacus'"):
        Emulating(profile="abacus").check(Predicting())


@pytest.mark.fast
def test_what_it_shows_fits_a_terminal_of_80_columns() -> None:
    cost = load_profile("laptop-cpu").cost
    times = [
        StepTime(seconds=1.1 * cost.step_s(count, count * 8000), sequences=count, resident_tokens=count * 8000)
        for count in (1, 8, 64)
    ]
    for chunk, start in ((16, 0), (64, 8000), (512, 0)):
        pairs = chunk * start + chunk * (chunk + 1) // 2
        seconds = cost.step_s(0, 0) + cost.prefill_s(chunk, start)
        times.append(StepTime(seconds=seconds, prefill_tokens=chunk, prefill_pairs=pairs))
    console = Console(width=80)
    with console.capture() as capture:
        show_steps(console, MeasuredSteps(tuple(times), 0.04, 3), fit_steps(times))
        show_profile(console, load_profile("laptop-cpu"))
    text = capture.get()
    assert "…" not in text
    for part in ("1 sequence of 8,000 tokens", "64 sequences of", "64 tokens of a prompt after 8,000", "vary by 4.0%"):
        assert part in text
    assert "KV memory: 11,648 tokens of 46,080 bytes" in text


def test_a_tiny_model_is_measured(tmp_path: Path) -> None:
    from tests.engine.tiny_models import save_tiny_model

    out, model = tmp_path / "tiny.toml", save_tiny_model("llama", tmp_path)
    (model / "tokenizer.json").touch()  # a model has one; measuring needs none
    options = {
        "--model": model,
        "--out": out,
        "--seconds": 1,
        "--kv-memory-mib": 1,
        "--max-sequences": 16,
        "--max-step-tokens": 64,
    }
    result = runner.invoke(app, ["profile", *(str(part) for option in options.items() for part in option)])
    assert result.exit_code == 0, result.output
    assert f"use it with `starmesh simulate --profile {out}`" in result.stdout
    profile = load_profile(out)
    assert profile.name == "tiny" and profile.kv_tokens * profile.layout.token_bytes <= 1 << 20
    assert (profile.max_sequences, profile.max_step_tokens) == (16, 64)
    assert 0 < profile.cost.step_s(4, 400) < 10 and profile.link.bytes_per_s == profile.cost.transfer_bytes_per_s
    assert {"profile", *number_names()} == profile.provenance.keys()
    assert "Measured on" in profile.provenance["profile"] and "two processes" in profile.provenance["link.bytes_per_s"]
