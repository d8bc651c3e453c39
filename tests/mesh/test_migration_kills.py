"""kill -9 of real processes at states of a migration: every stream goes on with the very tokens of an undisturbed run,
and blocks, leases, reservations and entries go back to zero.

Where in a state, of which instance and when is drawn from a seed. STARMESH_TEST_KILLS=source:COMMITTING/7 runs that one
alone, source:COMMITTING/7-90 the seeds up to 90, every/7-90 those for every point. tests/migration goes through all
states on virtual time.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from starmesh.v1 import inference_pb2
from tests.mesh.dying_decode import VARIABLE, Trap, clear_trap
from tests.mesh.moves import Moves
from tests.mesh.processes import Mesh, until
from tests.mesh.prompts import PROMPTS
from tests.mesh.streams import Answer, generate, generate_all, request

DECODES = ["decode-0", "decode-1", "decode-2"]
FLAGS = ("--kv-memory-mib", "16")
STREAMS = 4
OUTPUT_TOKENS = 96
PAUSE_S = 0.4
MAX_WAVES = 8
"""Streams are sent again until a migration has come to the point; few states are rare."""

POINTS = (
    "source:RESERVING",
    "source:COPYING",
    "source:FREEZING",
    "source:COMMITTING",
    "source:MOVED",
    "target:RESERVING",
    "target:RESERVED",
    "target:PULLING",
    "target:PULLING_TAIL",
    "target:CLAIMING",
    "target:STARTED",
    "target:ATTACHED",
)
"""What a migration goes through when all is well; the rest is on virtual time, where it can be had at will."""
BOTH = "both"
"""The target dies when it has all that it needs to claim, and the source when it takes the sequence back."""
LEDGER = "ledger"
"""The Redis dies under a claim and comes back empty."""


@dataclass(frozen=True)
class Wave:
    """Streams whose undisturbed answers are known."""

    messages: list[inference_pb2.GenerateRequest]
    expected: list[list[int]]


def chosen() -> list[tuple[str, int]]:
    """Points and seeds; each point its own."""
    named = os.environ.get("STARMESH_TEST_KILLS", "")
    if not named:
        return [(point, seed) for seed, point in enumerate((*POINTS, BOTH, LEDGER))]
    point, _, seeds = named.partition("/")
    first, _, last = seeds.partition("-")
    points = (*POINTS, BOTH, LEDGER) if point == "every" else (point,)
    return [(point, seed) for seed in range(int(first), int(last or first) + 1) for point in points]


@pytest.mark.timeout(900)
async def test_kill_9_at_states_of_a_migration(tiny_model_dir: Path, tmp_path: Path) -> None:
    """One mesh for all of them: what was killed is started again and takes part in the next."""
    environment = {VARIABLE: str(tmp_path)}
    modules = {"decode": "tests.mesh.dying_decode"}
    async with Mesh(tmp_path, tiny_model_dir, environment, forked=True, modules=modules) as mesh:
        await mesh.start_all(prefill=1, decode=3, flags=FLAGS)
        wave = await _undisturbed(mesh)
        recoveries, moved = 0, 0
        for point, seed in chosen():
            try:
                answers, moves = await _kill(mesh, wave, point, random.Random(f"{point}/{seed}"))
            except Exception as error:
                module = "tests/mesh/test_migration_kills.py"
                error.add_note(f"run it alone: STARMESH_TEST_KILLS={point}/{seed} python -m pytest {module}")
                raise
            recoveries += sum(answer.usage.recoveries for answer in answers if answer.usage)
            moved += moves.count("MOVED")
        print(f"{len(chosen())} kills: {moved} sequences moved, {recoveries} were recovered")


async def _undisturbed(mesh: Mesh) -> Wave:
    messages = []
    for number, prompt in enumerate(PROMPTS[:STREAMS]):
        sampled = {"temperature": 1.0, "top_p": 0.95, "seed": number} if number % 2 else {}
        messages.append(request(prompt, max_output_tokens=OUTPUT_TOKENS, ignore_eos=True, **sampled))
    answers = await generate_all(mesh.inference(), messages)
    await mesh.settled()
    return Wave(messages, [answer.token_ids for answer in answers])


async def _kill(mesh: Mesh, wave: Wave, point: str, draw: random.Random) -> tuple[list[Answer], Moves]:
    """Move sequences about until the kill has happened, start again what has died, and see what has become of
    everything."""
    moves = Moves(mesh, draw)
    answers: list[Answer] = []
    for number in range(MAX_WAVES):
        killing = Killing(mesh, point, moves)
        try:
            answers += await _disturbed(mesh, wave, moves, f"{point.replace(':', '-')}-{number}")
        finally:
            done = await killing.end()
        if done:
            break
    else:
        raise AssertionError(f"no migration came to {point}: {moves.ends}, {moves.refused}")
    await mesh.all_seen(5)
    await mesh.settled()
    return answers, moves


async def _disturbed(mesh: Mesh, wave: Wave, moves: Moves, name: str) -> list[Answer]:
    """Run the streams, and move their sequences until they end."""
    begun, ended = asyncio.Event(), asyncio.Event()
    stub = mesh.inference()
    running, wandering = [], []
    for number, message in enumerate(wave.messages):
        mine = inference_pb2.GenerateRequest()
        mine.CopyFrom(message)
        mine.request_id = f"{name}-{number}"
        running.append(asyncio.create_task(generate(stub, mine, on_token=lambda tokens: begun.set())))
        wandering.append(asyncio.create_task(moves.wander(mine.request_id, DECODES, ended, pause_s=PAUSE_S)))
    try:
        answers = await asyncio.gather(*running)
    finally:
        ended.set()
        await asyncio.gather(*wandering)
    assert [answer.token_ids for answer in answers] == wave.expected
    return answers


class Killing:
    """Sets the traps once some sequences have moved, and starts again what they kill."""

    def __init__(self, mesh: Mesh, point: str, moves: Moves) -> None:
        self._mesh = mesh
        self._moves = moves
        draw = moves.draw
        self._moves_before = moves.count("MOVED") + draw.randint(0, 4)
        self._away_s = draw.choice((0.0, 0.5))
        part, after_s = draw.random(), draw.choice((0.0, 0.0, 0.002, 0.02))
        victim, *others = draw.sample(DECODES, len(DECODES))
        self._traps = {victim: Trap(point, part, after_s)}
        self._deaths = 2 if point == BOTH else 1
        if point == BOTH:
            self._traps = {name: Trap("source:TAKING_BACK", draw.random()) for name in others}
            self._traps[victim] = Trap("target:CLAIMING", part)
        elif point == LEDGER:
            assert mesh.server is not None
            self._traps[victim] = Trap("target:CLAIMING", part, pid=mesh.server.pid)
        self._setting = asyncio.create_task(self._set())
        self._restarts: dict[str, asyncio.Task[None]] = {}

    async def end(self) -> bool:
        """Take away the traps that have not sprung, and wait until what was killed is back. Returns whether all that
        was to die has died."""
        self._setting.cancel()
        await asyncio.wait([self._setting])
        killed = 0
        for name, restart in self._restarts.items():
            if clear_trap(self._mesh.directory, name):
                restart.cancel()
            else:
                await restart
                killed += 1
        return killed >= self._deaths

    async def _set(self) -> None:
        await until(lambda: self._moves.count("MOVED") >= self._moves_before, "sequences to move", 300)
        for name, trap in self._traps.items():
            trap.set(self._mesh.directory, name)
            self._restarts[name] = asyncio.create_task(self._restart(name, trap))

    async def _restart(self, name: str, trap: Trap) -> None:
        mesh = self._mesh
        if trap.pid:
            assert mesh.server is not None
            server = mesh.server
            await until(lambda: not server.running, "the ledger to die", 300)
            await asyncio.sleep(self._away_s)
            await mesh.restart_ledger()
        else:
            assert await mesh.services[name].process.wait() == -signal.SIGKILL
            await asyncio.sleep(self._away_s)
            await mesh.start("decode", name, *FLAGS)
