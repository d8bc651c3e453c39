"""Marks in blocks: what a step computes is found again, and whatever is not there fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from starmesh.emulation.emulation import Emulation, check_kv_token_bytes
from starmesh.emulation.marks import KvMarks, WrongMark
from starmesh.engine.batch import Batch, BatchItem
from starmesh.profiles import load_profile
from starmesh.transfer.host_memory import HostMemory

pytestmark = pytest.mark.fast

EMULATION = Emulation(profile=load_profile("h100-7b").with_memory(64 * 16))
TOKENS = list(range(1000, 1040))
BLOCKS = (5, 3, 60)


def step(tokens: int, start: int, blocks: tuple[int, ...] = BLOCKS) -> Batch:
    """Computes the tokens from ``start`` on of a sequence of ``tokens`` tokens."""
    history = TOKENS[:tokens]
    return Batch((BatchItem("r", history[start:], start, blocks, history=history, prompt_tokens=10),))


@pytest.fixture
def memory() -> HostMemory:
    """A pool where a prompt of 35 tokens has been computed, and three tokens after it."""
    memory = HostMemory(EMULATION.layout, 64)
    marks = KvMarks(memory)
    marks.compute(step(35, 0), known_ids=set())
    for tokens in (36, 37, 38):
        marks.compute(step(tokens, tokens - 1), known_ids={"r"})
    return memory


def test_a_sequence_that_moves_finds_its_tokens(memory: HostMemory) -> None:
    target = HostMemory(EMULATION.layout, 64)
    moved = (1, 2, 4)
    for source_id, target_id in zip(BLOCKS, moved, strict=True):
        target.write_block(target_id, 0, memory.read_block(source_id))
    KvMarks(target).compute(step(39, 38, moved), known_ids=set())


@pytest.mark.parametrize("broken", ["swapped", "missing", "stale"])
def test_a_wrong_block_fails_the_step(memory: HostMemory, broken: str) -> None:
    blocks = {"swapped": (3, 5, 60), "missing": (5, 3, 9), "stale": BLOCKS}[broken]
    if broken == "stale":
        memory.write_block(60, 2 * EMULATION.layout.token_bytes, bytes(EMULATION.layout.token_bytes))
    with pytest.raises(WrongMark, match="of r"):
        KvMarks(memory).compute(step(39, 38, blocks), known_ids=set())


def test_all_parts_of_a_batch_are_marked(memory: HostMemory) -> None:
    marks = KvMarks(memory)
    other = replace(step(20, 4, (10, 11)).items[0], request_id="other")
    marks.compute(Batch((replace(other, token_ids=TOKENS[:4], start=0, history=None),)), known_ids=set())
    marks.compute(Batch((step(39, 38).items[0], other)), known_ids=set())
    marks.compute(Batch((step(40, 39).items[0], replace(step(21, 20, (10, 11)).items[0]))), known_ids=set())


def test_small_blocks_take_as_long_on_the_link_as_the_model_s() -> None:
    profile = EMULATION.profile
    fast = Emulation(profile=profile, speed=10.0)
    real_s = 1000 * profile.layout.token_bytes / profile.link.bytes_per_s
    assert 1000 * fast.layout.token_bytes / fast.link_bytes_per_s == pytest.approx(real_s / 10)
    assert fast.cost.transfer_s(1000 * fast.layout.token_bytes) == pytest.approx(
        profile.cost.transfer_s(1000 * profile.layout.token_bytes) / 10
    )
    assert fast.cost.step_s(8, 5000) == pytest.approx(profile.cost.step_s(8, 5000) / 10)
    assert fast.layout.token_bytes == 64
    assert Emulation(profile=profile, kv_token_bytes=0).layout.token_bytes == profile.layout.token_bytes


@pytest.mark.parametrize("wrong", [4, 6, 63])
def test_sizes_that_cannot_hold_a_mark_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        check_kv_token_bytes(wrong)


def test_a_pool_larger_than_the_machine_costs_nothing_until_it_is_written() -> None:
    profile = load_profile("h100-7b")
    whole = HostMemory(profile.layout, profile.total_blocks)
    assert whole.blocks.nbytes > 50e9
    whole.write_block(profile.total_blocks - 1, 0, b"end")
    assert bytes(whole.read_block(profile.total_blocks - 1)[:3]) == b"end"
