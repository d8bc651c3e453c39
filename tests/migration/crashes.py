"""Runs in which a migration loses something at one exact point: when an end of it has come to a given state.

The point lies before the first effect of the transition, between two, or after the last, as the seed draws it; so do
delays, drops and doubles, the requests and their lengths, and how long things stay broken. Then everything heals and
runs until nothing is under way.
"""

from __future__ import annotations

import random
from dataclasses import replace
from enum import Enum
from typing import Final

from starmesh.migration.source_record import SourceEnd, SourceState
from starmesh.migration.target_record import TargetEnd, TargetState
from tests.migration.checks import check_over
from tests.migration.instance_model import Instance
from tests.migration.router_model import Request
from tests.migration.timed import Faults, Killed, Timeline
from tests.migration.world import World

State = SourceState | TargetState

STATES: Final[dict[str, State]] = {
    **{f"source:{state.name}": state for state in SourceState},
    **{f"target:{state.name}": state for state in TargetState},
}
MAX_TURNS: Final = 50_000
MAX_REQUESTS: Final = 60
"""Requests that come before the point is reached; more do not help."""
QUIET_S: Final = 60.0
"""Virtual seconds after healing in which every timer has fired and every request has ended."""


class Loss(Enum):
    """What is lost at the point."""

    SOURCE = "source"
    TARGET = "target"
    BOTH = "both"
    """One after the other."""
    LEDGER_ANSWERS = "ledger-answers"
    """It is silent for a while; claims are done, or done late, or never."""
    LEDGER_ENTRIES = "ledger-entries"
    """It restarts empty."""


_LOST_COMMITS: Final = (Faults(lose_commit_calls=True), Faults(lose_commit_answers=True))
_UNHEARD: Final = tuple(replace(faults, migrations_unheard=True) for faults in _LOST_COMMITS)
_GIVEN_UP: Final = (Faults(pulls_fail=0.3), Faults(slow_pulls=True))
LEADS: Final[dict[State, tuple[Faults, ...]]] = {
    SourceState.TAKING_BACK: _LOST_COMMITS,
    SourceState.ASKING: _UNHEARD,
    SourceState.IN_DOUBT: _UNHEARD,
    SourceState.STAYED: (Faults(pulls_fail=0.3), Faults(lose_commit_calls=True)),
    SourceState.ENDED: (Faults(slow_pulls=True),),
    TargetState.ASKING: (Faults(migrations_unheard=True),),
    TargetState.STOPPING: (Faults(slow_pulls=True),),
    TargetState.FREED: _GIVEN_UP,
}
"""States that are reached only when something has gone wrong before: what."""


class Crash(World):
    """A world that breaks when an end comes to ``at``."""

    def __init__(self, seed: int, *, at: State, loss: Loss, verbose: bool = False) -> None:
        super().__init__()
        self.at = at
        self.loss = loss
        self.hit: tuple[State, Loss] | None = None
        self.draw = random.Random(seed)
        self.timeline = Timeline(self, self.draw, verbose=verbose)
        self.instant = self.draw.random()
        """Which part of the transition's effects is done by then."""
        self.arrivals = self.draw.choice((1, 1, 2))
        """How often an end comes to the state until then."""
        self.at_once = self.draw.randint(1, 3)
        self.pause_s = self.draw.choice((0.05, 0.3))
        self.faulty_s = self.draw.choice((0.0, 0.5, 5.0))
        self.reaction = self.draw.choice(("", "", "", "", "", "", "cut", "cancel"))
        """What the request's client or router does about it, a little later."""
        self.healed_at_s: float | None = None
        noise = Faults(drop=self.draw.choice((0, 0, 0.03)), double=self.draw.choice((0, 0.1)))
        self.noise = noise
        lead = self.draw.choice(LEADS.get(at, (Faults(),)))
        self.timeline.faults = replace(lead, drop=noise.drop, double=noise.double)

    def run(self) -> None:
        """Until nothing is under way. Raises AssertionError."""
        self.order()
        for _ in range(MAX_TURNS):
            if not self.timeline.turn():
                break
        else:
            raise AssertionError("it never comes to rest")
        assert self.hit, f"no migration came to {self.at}"
        assert self.healed_at_s is not None
        quiet_s = self.timeline.now_s - self.healed_at_s
        assert quiet_s < QUIET_S, f"it took {quiet_s} s to come to rest"
        assert not self.calls and not self.messages and not self.ledger_calls and not self.late_claims
        check_over(self)

    def order(self) -> None:
        """What comes from outside: requests, and commands to migrate."""
        if self.healed_at_s is not None:
            return
        if not self.hit and sum(not request.ended for request in self.requests.values()) < self.at_once:
            assert len(self.requests) < MAX_REQUESTS, f"no migration comes to {self.at}"
            self.add(self.draw.randint(1, 12), self.draw.randint(1, 40))
        orders = self.orders()
        if orders:
            self.draw.choice(orders)[1]()
        self.timeline.later(self.pause_s * self.draw.random(), "orders", self.order)

    def watch(self, life: Instance, end: SourceEnd | TargetEnd, done: int, effects: int) -> None:
        if self.hit or end.state is not self.at or done != round(self.instant * effects):
            return
        self.arrivals -= 1
        if self.arrivals > 0:
            return
        self.hit = (end.state, self.loss)
        self.timeline.faults = self.noise
        self.timeline.later(self.faulty_s, "heal", self.heal)
        self.note(f"{life.id}: {self.loss.value} lost at {end.state}, {done} of {effects} effects done")
        source_id, target_id = end.terms.source_id, end.terms.target_id
        match self.loss:
            case Loss.SOURCE:
                self.crash(source_id)
            case Loss.TARGET:
                self.crash(target_id)
            case Loss.BOTH:
                first, second = self.draw.sample((source_id, target_id), 2)
                self.crash(first)
                self.timeline.later(
                    self.draw.choice((0.0, 0.01, 0.5, 4.0)), f"crash {second}", lambda: self.crash(second)
                )
            case Loss.LEDGER_ANSWERS:
                self.timeline.faults = replace(self.noise, ledger_silent=True)
            case Loss.LEDGER_ENTRIES:
                self.lose_ledger()
        if self.reaction:
            request = self.requests[end.terms.request_id]
            self.timeline.later(self.draw.choice((0.0, 0.02, 1.0)), self.reaction, lambda: self.react(request))
        if not life.alive:
            raise Killed

    def react(self, request: Request) -> None:
        """The client goes away, or the router's stream to where it listens breaks."""
        if self.reaction == "cancel" and not request.ended:
            request.cancel()
        elif self.reaction == "cut" and request.link is not None:
            self.cut(request.link)

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        self.timeline.faults = Faults()
        self.healed_at_s = self.timeline.now_s


def run_crash(seed: int, *, at: State, loss: Loss, verbose: bool = False) -> Crash:
    """One run. Raises AssertionError, naming the command that replays it."""
    world = Crash(seed, at=at, loss=loss, verbose=verbose)
    try:
        world.run()
    except Exception as error:
        name = next(name for name, state in STATES.items() if state is at)
        command = f"python -m tests.migration.replay {seed} --at {name} --lose {loss.value}"
        raise AssertionError(f"{error!r}; replay it: {command}") from error
    return world
