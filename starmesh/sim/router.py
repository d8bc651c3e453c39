"""The router of a simulated cluster: the life of each request, from its arrival to its last token.

Owns requests in flight: their turn in the queue, dispatch, prefill, handoff, and all of that again after an instance
has died. What an instance does is its own (``instance``), and so is the choice between instances (``policy``). As live,
an instance without room is asked again later or another one is, a request whose KV nobody takes before its lease ends
is prefilled anew, and one that has begun is never turned away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from starmesh.engine.scheduler import QueueFull
from starmesh.policy.admission import AdmissionQueue, Need, Room, Waiting
from starmesh.policy.dispatch import DispatchConfig, DispatchMemory, DispatchPolicy, DispatchRequest, NoPlacement
from starmesh.sim.config import SimulationConfig
from starmesh.sim.events import Event, EventLoop
from starmesh.sim.handoff import Handoff
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.outcome import RequestOutcome
from starmesh.sim.owners import Owners
from starmesh.sim.predictors import SimulatedPredictor
from starmesh.sim.token_count import TokenCount
from starmesh.sim.views import Views
from starmesh.sim.waiting_lines import WaitingLines
from starmesh.sim.workload import SimulatedRequest
from starmesh.types import ClusterView, InstanceState, RemainingEstimate, Role, SamplingParams, SequenceSpec

LOOK_S = 0.2
"""How often a router looks at the ledger, and whether there is room for those that wait (live: ``view_interval_s``)."""

FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.0
"""How soon a request whose handoff was refused is placed again, and what that doubles to with each time (live:
``retries``)."""

LEASE_S = 30.0
"""How long a prefill instance keeps KV that nobody has pulled (live: ``kv_lease_s``)."""

_BOTH = (Role.PREFILL, Role.DECODE)


@dataclass(slots=True, eq=False)
class Flight:
    """A request in flight. ``output_tokens`` are those that its router had when it was last prefilled; ``decoding``
    says that a decode instance has it, and not a prefill instance or nobody."""

    number: int
    request: SimulatedRequest
    outcome: RequestOutcome
    output_tokens: int = 0
    epoch: int = 0
    prefill_id: str | None = None
    decode_id: str | None = None
    decoding: bool = False
    avoid: frozenset[str] = frozenset()
    refusals: int = 0
    estimate: RemainingEstimate | None = None
    handoff: Handoff | None = None
    lease_ends_s: float = 0.0
    first_s: float | None = None

    @property
    def started(self) -> bool:
        """Whether the client has any of the answer."""
        return self.outcome.first_token_s is not None

    @property
    def need(self) -> Need:
        """What it asks of an instance."""
        tokens = self.request.prompt_tokens + self.output_tokens
        return Need(tokens, max(0, self.request.max_output_tokens - self.output_tokens))

    def spec(self) -> SequenceSpec:
        """The sequence as an instance gets it."""
        return SequenceSpec(
            request_id=self.request.request_id,
            epoch=self.epoch,
            prompt_token_ids=TokenCount(self.request.prompt_tokens),  # type: ignore[arg-type]
            output_token_ids=TokenCount(self.output_tokens),  # type: ignore[arg-type]
            sampling=SamplingParams(max_output_tokens=self.request.max_output_tokens),
        )


@dataclass(slots=True)
class Router:
    """One router. ``took_over`` hears of each decode instance that has begun to decode a request, ``ended`` of each
    request once, when nothing of it is left."""

    loop: EventLoop
    config: SimulationConfig
    policy: DispatchPolicy
    views: Views
    owners: Owners
    instances: dict[str, SimulatedInstance]
    predictor: SimulatedPredictor | None
    hand_off: Callable[[str, str, SequenceSpec, Callable[[bool], None]], Handoff]
    took_over: Callable[[str], None]
    ended: Callable[[RequestOutcome], None]
    flights: dict[str, Flight] = field(default_factory=dict)
    _memory: DispatchMemory = field(default_factory=DispatchMemory)
    _queue: AdmissionQueue = field(init=False)
    _started: AdmissionQueue = field(init=False)
    _look: Event | None = None
    _dispatch: DispatchConfig = field(init=False)
    _lines: WaitingLines[Flight] | None = None

    def __post_init__(self) -> None:
        self._queue = AdmissionQueue(self.config.queue_length)
        self._started = AdmissionQueue(1 << 30)
        admit_all = self.config.strategy.admit_all
        self._dispatch = DispatchConfig(admission=dataclasses.replace(self.config.admission, admit_all=admit_all))
        if admit_all:
            self._lines = WaitingLines(self._hand_over)

    @property
    def waiting_requests(self) -> int:
        """Requests without a place."""
        return len(self._queue) + len(self._started)

    def arrive(self, number: int, request: SimulatedRequest) -> None:
        """A client asks."""
        outcome = RequestOutcome(
            request_id=request.request_id,
            arrived_s=self.loop.now_s,
            prompt_tokens=request.prompt_tokens,
        )
        flight = Flight(number, request, outcome)
        self.flights[request.request_id] = flight
        self._begin(flight)

    # What instances tell.

    def prefilled(self, request_id: str, *, ended: bool) -> None:
        """A prefill instance has computed the prompt and sampled the next token; with ``ended`` it was the last."""
        flight = self.flights[request_id]
        self.views.release(request_id, flight.prefill_id)
        flight.output_tokens += 1
        if not flight.started:
            flight.outcome.first_token_s = self.loop.now_s
        if ended:
            self.finished(request_id, output_tokens=flight.output_tokens)
            return
        flight.lease_ends_s = self.loop.now_s + LEASE_S
        self._choose_anew(flight)
        self._decode(flight)

    def finished(self, request_id: str, *, output_tokens: int) -> None:
        """A sequence has come to its end, which may be sooner than it wanted to."""
        flight = self.flights[request_id]
        flight.output_tokens = output_tokens
        flight.outcome.finished_s = self.loop.now_s
        flight.outcome.cut = output_tokens < flight.request.output_tokens
        self._close(flight)

    def moved(self, request_id: str, target_id: str, epoch: int, *, output_tokens: int) -> None:
        """A sequence, of which the client has ``output_tokens``, has moved to another decode instance: it counts there
        until a report includes it."""
        flight = self.flights.get(request_id)
        if flight is None:
            return
        self.views.release(request_id, flight.decode_id)
        flight.decode_id, flight.epoch = target_id, epoch
        flight.output_tokens = max(flight.output_tokens, output_tokens)
        flight.outcome.migrations += 1
        (target,) = (each for each in self.views.routed((Role.DECODE,)).instances if each.info.instance_id == target_id)
        self.views.place(request_id, target_id, Room(target, self.config.admission).reserve_tokens(flight.need))

    def preempted(self, request_id: str) -> None:
        """A sequence has lost its blocks."""
        flight = self.flights.get(request_id)
        if flight is not None:
            flight.outcome.preemptions += 1

    def lost(self, instance_id: str, tokens: dict[str, int]) -> None:
        """An instance has died; ``tokens`` says how many output tokens it had made of each sequence. Everything that
        was there is begun again elsewhere, prompt and output so far."""
        if self._lines is not None:
            self._lines.freed(instance_id)  # whoever waits there is to learn that it is gone
        for flight in list(self.flights.values()):
            request_id = flight.request.request_id
            if flight.decoding:
                # As the ledger has it: it may have moved, and nobody said so yet.
                owner = self.owners.owner(request_id)
                if owner is None or owner.instance_id != instance_id:
                    continue
                flight.output_tokens = max(flight.output_tokens, tokens.get(request_id, 0))
            elif instance_id != flight.prefill_id and (instance_id != flight.decode_id or flight.handoff is None):
                continue  # a prefill goes on without its decode instance; the handoff finds another
            self._recover(flight)

    # A request's turns.

    def _begin(self, flight: Flight) -> None:
        if self.waiting_requests or not self._place(flight):
            self._wait(flight)

    def _wait(self, flight: Flight) -> None:
        queue = self._started if flight.started else self._queue
        give_up_s = float("inf") if flight.started else self.loop.now_s + self.config.queue_timeout_s
        if not queue.push(Waiting(flight.request.request_id, give_up_s), self.loop.now_s):
            self._refuse(flight)
        elif self._look is None:
            self._look = self._at_next_look()

    def _at_next_look(self) -> Event:
        """The views know of it then."""
        return self.loop.at((math.floor(self.loop.now_s / LOOK_S + 1e-9) + 1) * LOOK_S, self._look_for_room)

    def _look_for_room(self) -> None:
        self._look = None
        for waiting in self._queue.expire(self.loop.now_s):
            self._refuse(self.flights[waiting.request_id])
        for queue in (self._started, self._queue):
            while len(queue):
                first = self.flights[next(iter(queue)).request_id]
                if not self._place(first):
                    break
                queue.pop(self.loop.now_s)
            if len(queue):
                break
        if self.waiting_requests and self._look is None:
            self._look = self._at_next_look()

    def _place(self, flight: Flight) -> bool:
        """Dispatch and begin the prefill. Returns False when there is no place now."""
        # Only the first of those that wait comes here.
        flight.first_s = self.loop.now_s if flight.first_s is None else flight.first_s
        held_s = self.loop.now_s - flight.first_s
        view = self.views.routed(_BOTH)
        excluded = self._excluded(flight, view)
        request = DispatchRequest(flight.request.request_id, flight.need, excluded, held_s=held_s)
        decision, self._memory = self.policy.choose(view, request, self._memory, self._dispatch)
        if decision.decode is None or decision.prefill is None:
            if decision.reason is NoPlacement.TOO_LONG and not flight.started:
                self._refuse(flight)
                return True
            flight.avoid = frozenset()
            return False
        flight.prefill_id, flight.decode_id = decision.prefill.instance_id, decision.decode.instance_id
        flight.decoding, flight.first_s = False, None
        request_id = flight.request.request_id
        self.views.place(request_id, flight.decode_id, decision.decode.reserve_tokens)
        self.views.place(request_id, flight.prefill_id, decision.prefill.reserve_tokens)
        if flight.outcome.placed_s is None:
            flight.outcome.placed_s = self.loop.now_s
        flight.epoch += 3  # as live: further than a migration claims
        self.owners.assign(request_id, flight.decode_id, flight.epoch)
        spec, prefill_id = flight.spec(), flight.prefill_id

        def added(result: object) -> None:
            if isinstance(result, QueueFull) and flight.prefill_id == prefill_id:
                self._recover(flight, recovered=False)

        self.instances[prefill_id].call(lambda core: core.add(spec, hold=True), added)
        return True

    def _choose_anew(self, flight: Flight) -> None:
        """Where to decode after all, now that there is a hidden state to predict the length from."""
        if self.predictor is None or not self.policy.uses_estimates:
            return
        flight.estimate = self.predictor.estimate(flight.number, flight.request, flight.output_tokens)
        self._choose_decode(flight, placed_id=flight.decode_id or "")

    def _choose_decode(self, flight: Flight, *, placed_id: str) -> bool:
        request_id = flight.request.request_id
        view = self.views.routed((Role.DECODE,), without=request_id)
        excluded = self._excluded(flight, view)
        request = DispatchRequest(request_id, flight.need, excluded, flight.estimate, placed_id)
        decision, self._memory = self.policy.choose_decode(
            view,
            request,
            self._memory,
            self._dispatch,
            layout=self.config.profile.layout,
        )
        if decision.decode is None:
            return False
        if decision.decode.instance_id != flight.decode_id:
            self.views.release(request_id, flight.decode_id)
            flight.decode_id = decision.decode.instance_id
            flight.epoch += 3
            self.owners.assign(request_id, flight.decode_id, flight.epoch)
        self.views.place(request_id, flight.decode_id, decision.decode.reserve_tokens)
        return True

    def _decode(self, flight: Flight) -> None:
        """Hand the sequence to its decode instance, or have it wait there."""
        if self._lines is None:
            self._hand_over(flight)
        else:
            self._lines.join(flight.decode_id or "", flight)

    def _hand_over(self, flight: Flight) -> None:
        assert flight.prefill_id is not None and flight.decode_id is not None
        epoch = flight.epoch

        def handed(done: bool) -> None:
            if flight.epoch != epoch or flight.request.request_id not in self.flights:
                return
            flight.handoff = None
            decode_id = flight.decode_id or ""
            if done:
                flight.decoding = True
                if self._lines is not None:
                    self._lines.taken(decode_id)
                self.took_over(decode_id)
            elif self._lines is not None and self._ready(decode_id):
                self._lines.refused(decode_id)
            else:
                if self._lines is not None:
                    self._lines.leave(decode_id, flight)
                flight.avoid |= {decode_id}
                delay_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2**flight.refusals)
                flight.refusals += 1
                self.loop.after(delay_s, lambda: self._decode_elsewhere(flight, epoch))

        flight.handoff = self.hand_off(flight.prefill_id, flight.decode_id, flight.spec(), handed)

    def _decode_elsewhere(self, flight: Flight, epoch: int) -> None:
        if flight.epoch != epoch or flight.request.request_id not in self.flights:
            return
        if self._lines is None and self.loop.now_s >= flight.lease_ends_s:
            self._recover(flight, recovered=False)
        elif self._choose_decode(flight, placed_id=""):
            self._decode(flight)
        else:
            flight.avoid = frozenset()
            self.loop.after(LOOK_S, lambda: self._decode_elsewhere(flight, epoch))

    def _ready(self, instance_id: str) -> bool:
        instance = self.instances.get(instance_id)
        return instance is not None and instance.alive and instance.info.state is InstanceState.READY

    def _excluded(self, flight: Flight, view: ClusterView) -> frozenset[str]:
        """The decode instances that have refused it, unless there are no others."""
        if not flight.avoid:
            return frozenset()
        ready = {each.info.instance_id for each in view.of_role(Role.DECODE) if each.info.state is InstanceState.READY}
        return flight.avoid if ready - flight.avoid else frozenset()

    def _recover(self, flight: Flight, *, recovered: bool = True) -> None:
        """Begin again from the tokens that the client has."""
        self._forget(flight)
        flight.outcome.recoveries += recovered
        flight.epoch += 3
        profile, request = self.config.profile, flight.request
        room_tokens = min(profile.max_sequence_tokens, profile.kv_tokens + 1) - request.prompt_tokens
        if flight.output_tokens >= min(request.output_tokens, room_tokens):
            self.finished(request.request_id, output_tokens=flight.output_tokens)
        else:
            self._begin(flight)

    def _forget(self, flight: Flight) -> None:
        """Nothing of it stays on an instance or is reserved there."""
        request_id = flight.request.request_id
        if flight.handoff is not None:
            flight.handoff.cancel()
            flight.handoff = None
        if self._lines is not None and flight.decode_id is not None:
            self._lines.leave(flight.decode_id, flight)
            if flight.decoding:
                self._lines.freed(flight.decode_id)
        for instance_id in (flight.prefill_id, flight.decode_id):
            self.views.release(request_id, instance_id)
            instance = self.instances.get(instance_id or "")
            if instance is not None and instance.alive and flight.outcome.finished_s is None:
                instance.call(lambda core: core.cancel(request_id))
        flight.prefill_id = flight.decode_id = None
        flight.decoding = False

    def _refuse(self, flight: Flight) -> None:
        flight.outcome.refused = True
        self._close(flight)

    def _close(self, flight: Flight) -> None:
        self._forget(flight)
        self.owners.disown(flight.request.request_id)
        del self.flights[flight.request.request_id]
        flight.outcome.output_tokens = flight.output_tokens
        self.ended(flight.outcome)
        if self.waiting_requests:
            if self._look is not None:
                self._look.cancel()
            # Room has come free: those that wait try at once, but not within this very call.
            self._look = self.loop.after(0.0, self._look_for_room)
