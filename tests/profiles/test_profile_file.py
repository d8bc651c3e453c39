"""Profile files: what is written is read again, and what cannot be is named."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starmesh.policy.cost import CostModel
from starmesh.profiles import Link, Profile, ProfileError, load_profile, profile_names, read_profile, write_profile
from starmesh.profiles.profile import DTYPES
from starmesh.profiles.profile_file import number_names
from starmesh.types import KvLayout

positive = st.floats(min_value=1e-12, max_value=1e15)
costs = st.floats(min_value=0, max_value=1e6)
counts = st.integers(1, 1 << 40)
texts = st.text(st.characters(codec="utf-8"))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    max_sequences = draw(counts)
    return Profile(
        name="drawn",
        cost=draw(st.builds(CostModel, costs, costs, positive, costs, positive, costs, costs)),
        layout=draw(st.builds(KvLayout, texts, st.sampled_from(DTYPES), counts, counts, counts, counts)),
        total_blocks=draw(counts),
        link=draw(st.builds(Link, positive, costs)),
        max_sequences=max_sequences,
        max_step_tokens=max_sequences + draw(st.integers(0, 1 << 20)),
        max_sequence_tokens=draw(counts),
        step_noise=draw(st.floats(0, 1, exclude_max=True)),
        provenance=draw(st.dictionaries(st.sampled_from(("profile", *number_names())), texts)),
    )


@given(profile=profiles())
def test_a_profile_that_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, profile: Profile) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.toml"
    write_profile(profile, path)
    assert read_profile(path) == profile
    assert load_profile(path) == load_profile(str(path)) == profile
    assert not [*path.parent.glob("*.part")]


def edited(directory: Path, pattern: str, replacement: str) -> Path:
    """A file of ours with one change."""
    path = directory / "mine.toml"
    write_profile(dataclasses.replace(load_profile("h100-7b"), name="mine"), path)
    text, changes = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert changes == 1
    path.write_text(text)
    return path


@pytest.mark.fast
@pytest.mark.parametrize(
    ("pattern", "replacement", "complaint"),
    [
        ("^total_blocks = .*\n", "", "total_blocks is missing"),
        ("^step_base_s = .*\n", "", r"cost\.step_base_s is missing"),
        ("^step_base_s", "step_bass_s", r"cost\.step_bass_s is unknown; here are .*step_base_s"),
        ("^total_blocks", "name = 'mine'\ntotal_blocks", "name is unknown"),
        ("^total_blocks = .*", "total_blocks = 1.0", "total_blocks must be a whole number, not 1.0"),
        ("^total_blocks = .*", "total_blocks = true", "total_blocks must be a whole number, not True"),
        ("^total_blocks = .*", "total_blocks = 0", "counts are at least 1"),
        ("^max_step_tokens = .*", "max_step_tokens = 8", "max_step_tokens is 8"),
        ("^step_token_s = .*", "step_token_s = '1'", r"cost\.step_token_s must be a number, not '1'"),
        ("^step_token_s = .*", "step_token_s = nan", r"cost\.step_token_s must be finite"),
        ("^step_token_s = .*", "step_token_s = 0", "step_token_s and transfer_bytes_per_s are above 0"),
        ("^bytes_per_s = .*", "bytes_per_s = -1", "a bandwidth above 0"),
        ("^layers = .*", "layers = 0", "a layout has counts of at least 1"),
        ("^dtype = .*", "dtype = 'int4'", "dtype of"),
        ("^dtype = .*", "dtype = 4", r"layout\.dtype must be a text, not 4"),
        (r"^\[link\]\n", "", r"cost\.|layout\.bytes_per_s is unknown"),
        (r"^\[provenance\]\n", '[provenance]\n"cost.step" = "?"\n', r"provenance\.cost\.step is of no number"),
        ("^step_noise = .*\n\n", "step_noise = 2\n\n", "step_noise within 0 to 1"),
        ('^step_noise = "assumed.*', "step_noise = 3", r"provenance\.step_noise must be a text, not 3"),
        ("^total_blocks = ", "total_blocks ", r"is not TOML: .*line 1.*; mend it there, or use one of"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, pattern: str, replacement: str, complaint: str) -> None:
    path = edited(tmp_path, pattern, replacement)
    with pytest.raises(ProfileError, match=complaint) as refused:
        load_profile(path)
    assert str(path) in str(refused.value)


@pytest.mark.fast
def test_a_profile_that_is_nowhere_is_told_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no profile 'abacus': use one of h100-32b, .*laptop-cpu"):
        load_profile("abacus")
    with pytest.raises(ProfileError, match=r"cannot read the profile .*mine\.toml: No such file .*; use one of"):
        load_profile(tmp_path / "mine.toml")


@pytest.mark.fast
def test_a_shipped_profile_goes_before_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("h100-7b").write_text("nothing")
    assert load_profile("h100-7b").name == "h100-7b"


@pytest.mark.fast
@pytest.mark.parametrize("name", profile_names())
def test_every_number_that_ships_says_where_it_comes_from(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert {"profile", *number_names()} == profile.provenance.keys()
    assert all(profile.provenance.values())
