"""Derived profiles: the files are what the formulas give, and the formulas near what others have measured."""

from __future__ import annotations

import dataclasses

import pytest

from starmesh.policy.cost import LAPTOP_CPU
from starmesh.profiles import Profile, ProfileError, load_profile, profile_names
from starmesh.profiles.derive import Assumptions, derive
from starmesh.profiles.shipped import H100, LLAMA_70B, PUBLISHED, QWEN_7B, QWEN_32B, Published, derived_profiles
from starmesh.profiles.term import given

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("profile", derived_profiles(), ids=lambda profile: profile.name)
def test_the_files_are_what_the_formulas_give(profile: Profile) -> None:
    assert load_profile(profile.name) == profile, "run python -m starmesh.profiles.shipped"


def test_all_but_the_measured_one_are_derived() -> None:
    assert {*profile_names()} - {profile.name for profile in derived_profiles()} == {"laptop-cpu"}


def test_the_policys_default_costs_are_the_measured_profiles() -> None:
    assert load_profile("laptop-cpu").cost == LAPTOP_CPU


def test_costs_by_hand() -> None:
    assume = Assumptions(memory_efficiency=1.0, flops_efficiency=1.0, step_overhead_s=0.0, sequence_overhead_s=0.0)
    profile = derive("by-hand", QWEN_7B, H100, assume=assume)
    table = 152_064 * 3584
    assert profile.cost.step_base_s == pytest.approx((7_615_616_512 - table) * 2 / 3.35e12, rel=1e-4)
    assert profile.cost.step_sequence_s == pytest.approx((7_615_616_512 - table) * 2 / 989e12, rel=1e-4)
    assert profile.cost.prefill_token_s == pytest.approx((7_615_616_512 - 2 * table) * 2 / 989e12, rel=1e-4)
    assert profile.layout.token_bytes == 56 * 1024
    assert profile.cost.step_token_s == pytest.approx(56 * 1024 / 3.35e12, rel=1e-4)
    assert profile.kv_tokens == pytest.approx((72e9 - 3e9 - 2 * 7_615_616_512) / (56 * 1024), abs=16)
    # 32 tokens of a prompt against 100 before them, by another way of counting.
    pairs = sum(100 + index for index in range(1, 33))
    attention_s = profile.cost.prefill_s(32, 100) - 32 * profile.cost.prefill_token_s
    assert attention_s == pytest.approx(pairs * 4 * 28 * 3584 / 989e12, rel=1e-4)


def test_accelerators_share_the_work_and_pay_for_it() -> None:
    three, four = (derive("shared", LLAMA_70B, H100, count=count).cost for count in (3, 4))
    assert four.step_token_s == pytest.approx(three.step_token_s * 3 / 4, rel=1e-3)
    all_reduces_s = 2 * 80 * 10e-6
    overhead_s = 1e-3 + all_reduces_s
    assert four.step_base_s - overhead_s == pytest.approx((three.step_base_s - overhead_s) * 3 / 4, rel=1e-3)
    assert four.prefill_token_s > three.prefill_token_s * 3 / 4


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ProfileError, match="does not fit 1 NVIDIA H100 SXM: take more"):
        derive("small", LLAMA_70B, H100)
    assert derive("tight", QWEN_32B, H100).kv_tokens < 32_768, "which is why h100-32b has two"


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda published: published.model.name)
def test_the_formulas_are_near_what_others_have_measured(published: Published) -> None:
    assert published.derived_s == pytest.approx(published.measured_s, rel=0.1)


def test_a_term_says_what_it_computed() -> None:
    six, two, one = given(6, "a"), given(2, "b"), given(1, "c")
    term = (six - (two - one)) * two / (one * two) + one
    assert term.value == (6 - (2 - 1)) * 2 / (1 * 2) + 1
    assert term.text == "(6 a - (2 b - 1 c)) x 2 b / (1 c x 2 b) + 1 c"
    assert one.is_given and not term.is_given


def test_other_memory() -> None:
    profile = load_profile("h100-7b").with_memory(50_001)
    assert (profile.total_blocks, profile.kv_tokens, profile.max_sequence_tokens) == (3126, 50_016, 50_016)
    assert profile.provenance["total_blocks"] == "chosen for this run"
    assert load_profile("h100-7b").with_memory(1 << 20).max_sequence_tokens == 131_072


def test_another_link_is_what_the_policy_believes_too() -> None:
    before = load_profile("h100-7b")
    profile = before.with_link(bytes_per_s=1e9)
    assert profile.link.bytes_per_s == profile.cost.transfer_bytes_per_s == 1e9
    assert dataclasses.replace(profile, cost=before.cost, link=before.link, provenance=before.provenance) == before


def test_another_speed_of_recomputing() -> None:
    before = load_profile("h100-7b")
    profile = before.with_recompute_speed(4.0)
    assert profile.cost.prefill_s(1000, 24) == pytest.approx(before.cost.prefill_s(1000, 24) / 4)
    assert profile.cost.step_s(8, 1000) == before.cost.step_s(8, 1000)
    with pytest.raises(ProfileError, match="above 0"):
        before.with_recompute_speed(0.0)
