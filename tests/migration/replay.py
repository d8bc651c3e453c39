"""Runs of the world from seeds: ``python -m tests.migration.replay SEED`` tells one of them action by action, and with
``--at source:COMMITTING --lose target`` one of ``crashes``' instead.

A seed draws both the actions and how likely each kind of fault is in this run: one with crashes only finds other
mistakes than one with a bit of everything.
"""

from __future__ import annotations

import argparse
import random

from tests.migration.checks import check, heal
from tests.migration.crashes import STATES, Loss, run_crash
from tests.migration.world import Action, World

STEPS = 400


def run(seed: int, *, verbose: bool = False) -> World:
    """A run under faults, then healed. Raises AssertionError, naming the command that replays it."""
    draw = random.Random(seed)
    world = World()
    chances = {
        world.network_faults: draw.choice((0, 0.02, 0.1)),
        world.ledger_faults: draw.choice((0, 0.1, 0.5, 0.8)),
        world.preemptions: draw.choice((0, 0.01, 0.05)),
        world.timers: draw.choice((0, 0.01, 0.05)),
        world.disasters: draw.choice((0, 0.01, 0.03)),
        world.orders: draw.choice((0.05, 0.2)),
        world.steps: draw.choice((0.05, 0.15, 0.4)),
    }
    try:
        for _ in range(draw.randint(1, 2)):
            world.add(draw.randint(1, 12), draw.randint(1, 30))
        for _ in range(STEPS):
            actions: list[Action] = []
            for kind, chance in chances.items():
                if draw.random() < chance and not actions:
                    actions = kind()
            act(world, actions or world.work() or world.steps(), draw.randrange(1 << 16), verbose=verbose)
        heal(world)
    except Exception as error:
        raise AssertionError(f"{error!r}; replay it: python -m tests.migration.replay {seed}") from error
    return world


def act(world: World, actions: list[Action], choice: int, *, verbose: bool = False) -> None:
    """Do one of ``actions`` and check."""
    if not actions:
        return
    name, do = actions[choice % len(actions)]
    told = len(world.log)
    do()
    if verbose:
        print(name, *(f"\n    {line}" for line in world.log[told:]))
    check(world)


def main() -> None:
    """Tell one run."""
    parser = argparse.ArgumentParser(prog="python -m tests.migration.replay")
    parser.add_argument("seed", type=int)
    parser.add_argument("--at", choices=STATES, metavar="END:STATE")
    parser.add_argument("--lose", choices=[loss.value for loss in Loss])
    chosen = parser.parse_args()
    if (chosen.at is None) != (chosen.lose is None):
        parser.error("--at and --lose go together")
    if chosen.at is None:
        run(chosen.seed, verbose=True)
    else:
        run_crash(chosen.seed, at=STATES[chosen.at], loss=Loss(chosen.lose), verbose=True)


if __name__ == "__main__":
    main()
