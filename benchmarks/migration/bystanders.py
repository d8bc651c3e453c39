"""What copy rounds do to the steps of the sequences that stay where one leaves or arrives."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.migration.client import Client, Stream
from benchmarks.migration.idle_source import open_idle_source
from benchmarks.migration.processes import LIVE_PAIR, Member, Processes
from benchmarks.migration.spread import spread

MIN_OVERLAP = 0.05
"""Share of a step that copying must overlap. A source tells the end of a round between two steps, so by the time that a
client hears of it the next may have begun."""


@dataclass(frozen=True, slots=True)
class BystanderPlan:
    """``sequences`` of ``tokens`` stay at an instance while one of ``mover_tokens`` moves ``moves`` times by each
    backend; ``quiet_steps`` before each copy are what its steps are compared with."""

    sequences: int
    tokens: int
    mover_tokens: int
    moves: int
    quiet_steps: int


@dataclass(frozen=True, slots=True)
class Place:
    """What a slowdown depends on. ``setting``: "core_each" (both ends decode, on half of the cores each) or
    "core_spare" (on all cores, and the other end decodes nothing then); ``end``: "source" or "target"."""

    setting: str
    end: str
    backend: str


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Steps of one instance around one move. ``during`` is the mean of those that overlap copy rounds over the mean of
    the quiet ones before (``step_s``), ``noise`` the mean of the later quiet ones over that of the earlier ones,
    ``lost_s`` what the steps during copies took beyond the quiet mean, all together."""

    during: float
    noise: float
    lost_s: float
    step_s: float


class Bystanders:
    """Slowdowns by place."""

    def __init__(self, client: Client, processes: Processes, plan: BystanderPlan, note: Callable[[str], None]) -> None:
        self._client = client
        self._processes = processes
        self._plan = plan
        self._note = note
        self._found: dict[Place, list[Slowdown]] = defaultdict(list)

    async def measure(self) -> None:
        """Bystanders at both ends on cores of their own; then at one end only, with all cores for both."""
        mover = await self._client.start(LIVE_PAIR[0], self._plan.mover_tokens)
        for member in LIVE_PAIR:
            self._processes.pin(member)
        await self._while_moving(mover, LIVE_PAIR, "core_each")
        for member in LIVE_PAIR:
            self._processes.unpin(member)
        # As the target of the way back an instance would share the cores with the source's steps.
        for member in LIVE_PAIR:
            await self._while_moving(mover, (member,), "core_spare")
        self._client.cancel(mover)
        for member in LIVE_PAIR:
            await self._while_taking(member)
        for place, slowdowns in self._found.items():
            median = statistics.median(one.during for one in slowdowns)
            self._note(f"{place.setting}, {place.end}, {place.backend}: steps take {median - 1:+.1%} during copies")

    def describe(self) -> dict[str, Any]:
        """What the benchmark's result has of them, by setting, end and backend. A slowdown of 0.01 is 1 % more time."""
        return {
            "bystander_slowdown": self._tree(lambda one: one.during - 1),
            "bystander_noise": self._tree(lambda one: one.noise - 1),
            "bystander_lost_ms": self._tree(lambda one: 1e3 * one.lost_s),
            "bystander_step_ms": self._tree(lambda one: 1e3 * one.step_s),
        }

    async def _while_moving(self, mover: Stream, homes: tuple[Member, ...], setting: str) -> None:
        """``mover`` moves back and forth between the live instances, others stay at ``homes``."""
        plan, client = self._plan, self._client
        async with AsyncExitStack() as stack:
            staying = {home.name: await stack.enter_async_context(self._stay_at(home)) for home in homes}
            for source, target in itertools.islice(itertools.cycle((LIVE_PAIR, LIVE_PAIR[::-1])), 2 * plan.moves):
                move = await client.move(mover, target, settle_tokens=plan.quiet_steps // 2 + 1)
                for end, member in (("source", source), ("target", target)):
                    if member in homes and (setting == "core_each" or end == "source"):
                        place = Place(setting, end, target.backend.value)
                        self._found[place].append(slowdown(staying[member.name], move.copying_s, plan.quiet_steps))

    async def _while_taking(self, home: Member) -> None:
        """Others stay at ``home`` while it takes blocks in from a source that does nothing else."""
        plan, address = self._plan, self._processes.address(home.name)
        async with open_idle_source(address, plan.mover_tokens) as source, self._stay_at(home) as bystander:
            for _ in range(plan.moves):
                await bystander.until(len(bystander.token_ids) + plan.quiet_steps + 1)
                copying_s = await source.copy(home, address)
                await bystander.until(len(bystander.token_ids) + 1)
                place = Place("core_spare", "target", home.backend.value)
                self._found[place].append(slowdown(bystander, copying_s, plan.quiet_steps))

    @asynccontextmanager
    async def _stay_at(self, home: Member) -> AsyncIterator[Stream]:
        """Sequences that decode at ``home``; one of them."""
        staying = [await self._client.start(home, self._plan.tokens) for _ in range(self._plan.sequences)]
        yield staying[0]
        for stream in staying:
            self._client.cancel(stream)

    def _tree(self, value: Callable[[Slowdown], float]) -> dict[str, Any]:
        tree: dict[str, dict[str, dict[str, list[float]]]] = {}
        for place, found in self._found.items():
            ends = tree.setdefault(place.setting, {})
            ends.setdefault(place.end, {})[place.backend] = spread([value(one) for one in found])
        return tree


def slowdown(bystander: Stream, copying_s: tuple[float, float], quiet_steps: int) -> Slowdown:
    """What copying did to the steps of a bystander's instance: each step brings it a token."""
    start_s, end_s = copying_s
    steps = list(itertools.pairwise(bystander.arrivals))
    quiet = [later - earlier for earlier, later in steps if later <= start_s][-quiet_steps:]
    during = [
        later - earlier
        for earlier, later in steps
        if min(later, end_s) - max(earlier, start_s) > MIN_OVERLAP * (later - earlier)
    ]
    half = len(quiet) // 2
    step_s = statistics.fmean(quiet)
    return Slowdown(
        during=statistics.fmean(during) / step_s,
        noise=statistics.fmean(quiet[half:]) / statistics.fmean(quiet[:half]),
        lost_s=sum(during) - len(during) * step_s,
        step_s=step_s,
    )
