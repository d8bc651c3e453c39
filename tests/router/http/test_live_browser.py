"""The live page in a real browser, with frames that no router would make: hostile ones, huge ones, and with a key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from fastapi import FastAPI
from playwright.async_api import expect

from services.router.cluster_frames import ClusterFrames
from services.router.http.errors import answer_in_openai_shape
from services.router.http.live import live_routes
from services.router.http.server import HttpServer
from starmesh.rpc.api_keys import ApiKeys
from starmesh.rpc.key_file import ApiKey, Scope, digest_of, new_secret, write_keys
from starmesh.v1 import cluster_pb2, decode_pb2
from tests.browser import WAIT_MS, visit

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


class Scripted:
    """Stands for a router's frames."""

    def __init__(self, make: Callable[[], cluster_pb2.WatchClusterResponse]) -> None:
        self.stopping = asyncio.Event()
        self.make = make

    async def frame(self, **_: Any) -> cluster_pb2.WatchClusterResponse:
        frame = self.make()
        frame.observe_time.GetCurrentTime()
        return frame


@asynccontextmanager
async def served(frames: Scripted, keys: ApiKeys | None = None) -> AsyncIterator[str]:
    """The origin of a server of nothing but the live page."""
    app = FastAPI(openapi_url=None)
    answer_in_openai_shape(app, refused=lambda status: None)
    app.include_router(live_routes(cast(ClusterFrames, frames), keys))
    server = HttpServer(app, host="127.0.0.1", port=0)
    origin = f"http://{await server.start()}"
    try:
        yield origin
    finally:
        frames.stopping.set()
        await server.stop(5.0)


def cluster(names: list[str], *, sequences: int = 2) -> cluster_pb2.WatchClusterResponse:
    made = cluster_pb2.WatchClusterResponse(ledger_available=True, router_id="router-0")
    for place, name in enumerate(names):
        instance = made.instances.add(
            instance_id=name, role=cluster_pb2.ROLE_DECODE, state=cluster_pb2.INSTANCE_STATE_READY
        )
        instance.layout.block_tokens = 16
        load = instance.load
        load.total_blocks, load.free_blocks = 1000, 1000 - place % 900
        load.running_sequences, load.resident_tokens = sequences, 16 * (place % 900)
        for number in range(sequences):
            load.sequences.add(
                request_id=f"{name}-s{number}", epoch=1, resident_tokens=8 * (place % 900), output_tokens=3
            )
    return made


def with_move(made: cluster_pb2.WatchClusterResponse, request_id: str) -> cluster_pb2.WatchClusterResponse:
    """Tells of a move from the first to the second instance, and of the round that decided it."""
    source, target = (instance.instance_id for instance in made.instances[:2])
    told = made.rounds.add(leader_instance_id=HOSTILE, leader_term=1, policy=HOSTILE, rounds=1, planned_moves=1)
    told.skipped_sequences[HOSTILE] = 2
    for move in (made.migrations.add(), told.moves.add()):
        move.request_id, move.source_instance_id, move.target_instance_id = request_id, source, target
        move.outcome, move.reason = cluster_pb2.MIGRATION_OUTCOME_MOVED, decode_pb2.MIGRATION_REASON_LOAD
        move.description = HOSTILE
    return made


async def test_what_looks_like_html_stays_text() -> None:
    names = [f"decode-{HOSTILE}", "decode-1"]
    async with served(Scripted(lambda: with_move(cluster(names), HOSTILE))) as origin, visit(f"{origin}/") as seen:
        page = seen.page
        await page.wait_for_selector("#moves-list .outcome")
        assert await page.inner_text("#moves-list .id") == HOSTILE
        assert await page.inner_text(".lane .name") == names[0]
        assert await page.locator("img").count() == 0 and await page.locator("script").count() == 1
        assert await page.title() == "starmesh live"
        # Even a script of ours could not: the browser refuses to make HTML of a string.
        made = "document.body.innerHTML = '<b>x</b>'"
        assert await page.evaluate(
            f"() => {{ try {{ {made}; return 'made' }} catch (error) {{ return error.name }} }}"
        ) == ("TypeError")
        # Which it complains of, as it should.
        assert [said for said in seen.complaints if "TrustedHTML" not in said] == []
        seen.complaints.clear()
        seen.check(origin)


async def test_many_instances_are_tiles_that_can_be_ordered() -> None:
    names = [f"decode-{number}" for number in range(256)]
    frames = Scripted(lambda: cluster(names, sequences=4))
    async with served(frames) as origin, visit(f"{origin}/live", scheme="dark") as seen:
        page = seen.page
        await expect(page.locator(".tile")).to_have_count(256, timeout=WAIT_MS)
        assert await page.locator(".block").count() == 0, "too many to be told apart"
        assert await page.locator(".tile").first.get_attribute("data-instance") == "decode-0"
        await page.select_option("#order", "used")
        first = page.locator(".tile").first
        await expect(first).to_have_attribute("data-instance", "decode-255", timeout=WAIT_MS)
        # It does not freeze: a frame of 256 instances is drawn well within the time to the next one.
        drawn = await page.evaluate(
            "() => new Promise((done) => { const from = performance.now(); "
            "document.getElementById('order').dispatchEvent(new Event('change')); "
            "requestAnimationFrame(() => done(performance.now() - from)) })"
        )
        print(f"256 instances are drawn in {drawn:.0f} ms")
        seen.check(origin)


async def test_few_become_many_and_some_go() -> None:
    count = 3

    def make() -> cluster_pb2.WatchClusterResponse:
        return cluster([f"decode-{number}" for number in range(count)])

    async with served(Scripted(make)) as origin, visit(f"{origin}/live", width=420, height=900) as seen:
        page = seen.page
        for count, form in ((3, "lane"), (20, "tile"), (2, "lane")):
            await expect(page.locator(f".{form}")).to_have_count(count, timeout=WAIT_MS)
        await expect(page.locator(".tile")).to_have_count(0, timeout=WAIT_MS)
        wide = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, "nothing is wider than a narrow screen"
        seen.check(origin)


async def test_it_is_used_by_keyboard_and_read_aloud() -> None:
    async with served(Scripted(lambda: cluster(["decode-0", "decode-1"]))) as origin, visit(f"{origin}/live") as seen:
        page = seen.page
        await page.wait_for_selector(".block")
        first = page.locator("[data-request='decode-1-s0']")
        await first.focus()
        await page.keyboard.press("ArrowRight")
        focused = "document.activeElement.dataset.request"
        assert await page.evaluate(focused) == "decode-1-s1"
        assert "decode-1-s1 at decode-1" in await page.inner_text("#detail")
        assert await page.get_by_role("listitem", name="decode-1, ready").count() == 1
        assert await page.get_by_role("img", name="KV 0 % in use").count() >= 1
        await page.keyboard.press("p")
        assert await page.get_by_role("button", name="Go on").get_attribute("aria-pressed") == "true"
        await page.keyboard.press("t")
        assert await page.evaluate("document.documentElement.style.colorScheme") == "dark"
        seen.check(origin)


async def test_a_key_is_asked_for_and_kept_in_the_tab(tmp_path: Path) -> None:
    secret = new_secret()
    operator = ApiKey(
        key_id="operator",
        sha256=digest_of(secret),
        scopes=frozenset({Scope.OPERATE}),
        requests_per_s=None,
        max_requests=None,
        expires=None,
    )
    write_keys(tmp_path / "keys", (operator,))
    keys = ApiKeys.load(tmp_path / "keys")
    async with served(Scripted(lambda: cluster(["decode-0"])), keys) as origin, visit(f"{origin}/live") as seen:
        page = seen.page
        await page.wait_for_selector("#key-text")
        await page.fill("#key-text", new_secret())
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#key-problem:has-text('is not known here')")
        await page.fill("#key-text", secret)
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".lane")
        await page.reload()
        await page.wait_for_selector(".lane")
        assert secret not in page.url and await page.evaluate("document.cookie") == ""
        # The browser itself tells of the two refusals.
        assert [said for said in seen.complaints if "401" not in said] == []
        seen.complaints.clear()
        seen.check(origin)


async def test_a_router_that_stops_is_told_from_one_that_works() -> None:
    frames = Scripted(lambda: cluster(["decode-0"]))
    async with served(frames) as origin, visit(f"{origin}/live") as seen:
        await seen.page.wait_for_selector("#status[data-state=live]")
        frames.stopping.set()
        await seen.page.wait_for_selector("#status[data-state=lost]")
        assert "stopping" in await seen.page.inner_text("#status")
