"""Transfers share a link: each lasts as long as its share of the bytes takes, and one that goes leaves its share."""

from __future__ import annotations

import asyncio

import pytest

from starmesh.emulation.link import SharedLink

MIB = 1 << 20


async def timed(link: SharedLink, size_bytes: int, *, real_s: float = 0.0) -> float:
    """How long a transfer takes whose bytes are really there after ``real_s``."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with link.transfer(size_bytes):
        await asyncio.sleep(real_s)
    return loop.time() - began_s


async def test_a_transfer_takes_its_time_and_no_less_than_it_really_takes() -> None:
    link = SharedLink(10 * MIB)
    assert await timed(link, MIB) >= 0.099
    assert await timed(link, 1, real_s=0.05) >= 0.049


async def test_transfers_share_the_link_equally() -> None:
    """Of two that begin together the shorter has half the link until it ends, the longer all of it after that."""
    link = SharedLink(10 * MIB)
    ends: list[str] = []

    async def ending(name: str, size_bytes: int) -> float:
        took_s = await timed(link, size_bytes)
        ends.append(name)
        return took_s

    short_s, long_s = await asyncio.gather(ending("short", MIB), ending("long", 2 * MIB))
    assert short_s >= 0.199
    assert long_s >= 0.299
    assert ends == ["short", "long"]


async def test_one_that_is_cancelled_gives_its_share_back() -> None:
    link = SharedLink(MIB)
    endless = asyncio.create_task(timed(link, 1 << 40))
    patient = asyncio.create_task(timed(link, MIB // 10))
    await asyncio.sleep(0.02)
    endless.cancel()
    with pytest.raises(asyncio.CancelledError):
        await endless
    assert await asyncio.wait_for(patient, 30) >= 0.1


async def test_one_that_fails_leaves_the_link_to_others() -> None:
    link = SharedLink(MIB)
    with pytest.raises(RuntimeError):
        async with link.transfer(1 << 40):
            raise RuntimeError("the holder died")
    assert await asyncio.wait_for(timed(link, MIB // 10), 30) >= 0.099
