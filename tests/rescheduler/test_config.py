"""Settings: what reaches the policy, and errors that name the flag."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.rescheduler.config import ReschedulerSettings
from starmesh.policy.rescheduling import ReschedulingConfig
from starmesh.profiles import load_profile, write_profile

pytestmark = pytest.mark.fast


def settings(*flags: str) -> ReschedulerSettings:
    return ReschedulerSettings(_cli_parse_args=list(flags))  # type: ignore[call-arg]


def test_defaults_are_the_policys_own() -> None:
    assert settings().rescheduling() == ReschedulingConfig()
    assert load_profile("laptop-cpu").cost == ReschedulingConfig().cost


def test_flags_reach_the_policy() -> None:
    flags = ("--policy", "llumnix", "--horizon-steps", "64", "--hysteresis", "3.5", "--max-in-flight", "5")
    expected = {"policy": "llumnix", "horizon_steps": 64, "hysteresis": 3.5, "max_in_flight": 5}
    assert settings(*flags).rescheduling() == dataclasses.replace(ReschedulingConfig(), **expected)  # type: ignore[arg-type]


def test_costs_are_those_of_any_profile(tmp_path: Path) -> None:
    profile = load_profile("h100-7b")
    assert settings("--profile", "h100-7b").rescheduling().cost == profile.cost
    mine = profile.with_link(bytes_per_s=1e9)
    write_profile(mine, tmp_path / "mine.toml")
    assert settings("--profile", str(tmp_path / "mine.toml")).rescheduling().cost == mine.cost


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("policy", "best"),
        ("profile", "abacus"),
        ("round_interval_s", "0"),
        ("watermark", "1"),
        ("max_in_flight_per_target", "0"),
        ("cool_down_s", "-1"),
        ("horizon_steps", "many"),
        ("record", "/no/such/directory/file"),
        ("record_max_mib", "0"),
    ],
)
def test_bad_values_name_their_flag(flag: str, value: str) -> None:
    with pytest.raises(ValidationError) as refused:
        settings(f"--{flag.replace('_', '-')}", value)
    (problem,) = refused.value.errors()
    assert problem["loc"] == (flag,)


def test_every_value_that_passes_is_one_that_the_policy_takes() -> None:
    lowest = ("--horizon-steps", "0", "--overload-margin", "0", "--amortisation", "0", "--hysteresis", "0")
    lowest += ("--watermark", "0", "--max-in-flight", "1", "--cool-down-s", "0", "--failure-cool-down-s", "0")
    assert settings(*lowest).rescheduling().horizon_steps == 0


def test_the_lead_outlasts_a_few_rounds() -> None:
    assert settings().lead_ttl_s == 6.0
    assert settings("--round-interval-s", "30").lead_ttl_s == 90.0
