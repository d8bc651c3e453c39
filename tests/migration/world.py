"""A cluster small enough to hold in one's head: three decode instances, a router and a ledger, on a faulty network.

Both ends of the protocol are the real ones, and so is the router's token stream; the rest is what a shell would do, one
indivisible action at a time, in whatever order the caller picks: calls and answers between instances lie in a bag, the
router's streams are in order or broken for good, and the ledger does a claim at once, later or never, whatever it says.
Timers may fire at any time, so nothing here can be safe only because a clock was right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from starmesh.migration import target_record as tr
from starmesh.migration.source_record import SourceEnd
from starmesh.migration.target_record import TargetEnd
from starmesh.migration.terms import LedgerSilent, OwnerIs, Terms, TimedOut
from starmesh.types import Ownership
from tests.migration.engine_model import blocks_for
from tests.migration.instance_model import Instance
from tests.migration.router_model import Request
from tests.migration.wire_model import Call, LedgerCall, Link

Action = tuple[str, Callable[[], None]]
Effect = TypeVar("Effect")


class World:
    """Everything; ``actions`` lists what may happen next, ``check`` what must hold in between."""

    def __init__(self, instances: int = 3) -> None:
        self.numbers = 0
        self.now_s = 0.0
        self.log: list[str] = []
        self.lives = {name: Instance(self, name) for name in "ABC"[:instances]}
        self.entries: dict[str, Ownership] = {}
        self.ledger_calls: list[LedgerCall] = []
        self.ledger_answers: list[tuple[LedgerCall, OwnerIs]] = []
        self.late_claims: list[LedgerCall] = []
        self.won: set[tuple[str, Ownership]] = set()
        self.ledger_lost = False
        self.messages: list[tuple[Instance, tuple[Any, ...]]] = []
        self.calls: dict[int, Call] = {}
        self.links: dict[str, Link] = {}
        self.parting: list[Link] = []
        self.requests: dict[str, Request] = {}
        self.picks = 0
        self.marks: set[str] = set()

    def note(self, line: str) -> None:
        self.log.append(line)
        self.marks.add(line.split(": ", 1)[1])

    def next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def pick_instance(self) -> str:
        self.picks += 1
        return sorted(self.lives)[self.picks % len(self.lives)]

    # What the ends of a migration do, for those who want to interfere just there.

    def one_by_one(self, life: Instance, end: SourceEnd | TargetEnd, effects: tuple[Effect, ...]) -> Iterator[Effect]:
        """The effects of a transition that ``life`` has made to ``end``, each when the one before it is done."""
        for number, effect in enumerate(effects):
            self.watch(life, end, number, len(effects))
            yield effect
        self.watch(life, end, len(effects), len(effects))

    def watch(self, life: Instance, end: SourceEnd | TargetEnd, done: int, effects: int) -> None:
        """``life`` has come to ``end`` and carried out ``done`` of ``effects`` effects. May raise to end it there."""

    # The network and the ledger.

    def send(self, caller: Instance, instance_id: str, message: tuple[Any, ...]) -> None:
        self.messages.append((self.lives[instance_id], message))

    def call(self, caller: Instance, terms: Terms, request: tuple[str, Any]) -> int:
        number = self.next_number()
        self.calls[number] = Call(number, caller, terms.request_id)
        self.send(caller, terms.target_id, ("call", number, terms, request))
        return number

    def answer(self, number: int, answer: object) -> None:
        call = self.calls.get(number)
        if call is not None:
            self.messages.append((call.caller, ("answer", number, answer)))

    def fail_call(self, number: int) -> None:
        call = self.calls.pop(number)
        if call.caller.alive:
            call.caller.answered(call.request_id, number, None)

    def arrive(self, index: int) -> None:
        self.receive(*self.messages.pop(index))

    def receive(self, receiver: Instance, message: tuple[Any, ...]) -> None:
        if not receiver.alive:
            return
        match message:
            case ("call", number, terms, request):
                receiver.called(number, terms, request)
            case ("answer", number, answer):
                call = self.calls.pop(number, None)
                if call is not None:
                    receiver.answered(call.request_id, number, answer)
            case ("abort", reservation_id, event):
                if reservation_id in receiver.targets:
                    receiver.on_target(reservation_id, event)

    def execute(self, call: LedgerCall) -> OwnerIs:
        current = self.entries.get(call.request_id)
        if call.new is not None and current == call.expected:
            assert call.expected is None or call.new.epoch > call.expected.epoch
            current = self.entries[call.request_id] = call.new
            self.won.add((call.request_id, call.new))
        return OwnerIs(current)

    def disown(self, request_id: str, epoch: int) -> None:
        if request_id in self.entries and self.entries[request_id].epoch <= epoch:
            del self.entries[request_id]

    def link_to(self, instance_id: str) -> Link:
        link = self.links.get(instance_id)
        if link is None or link.broken:
            link = self.links[instance_id] = Link(self.lives[instance_id])
        return link

    # Faults.

    def crash(self, instance_id: str) -> None:
        life = self.lives[instance_id]
        life.alive = False
        self.lives[instance_id] = Instance(self, instance_id)
        self.note(f"{instance_id}: crashed")
        link = self.links.get(instance_id)
        if link is not None:
            self.cut(link)

    def cut(self, link: Link) -> None:
        if not link.broken:
            link.broken = True
            self.parting.append(link)
            for request in self.requests.values():
                request.lost(link)

    def part(self, link: Link) -> None:
        """The instance sees that the router's stream has broken."""
        self.parting.remove(link)
        life = link.instance
        if life.alive:
            for request_id in [key for key, running in life.running.items() if running.link is link]:
                life.end(request_id)

    def up(self, link: Link) -> None:
        action, body = link.up.popleft()
        life = link.instance
        if not life.alive or link.broken:
            return
        if action == "start":
            life.start(link, body)
        elif action == "attach":
            life.attach(link, *body)
        else:
            request_id, epoch = body
            life.cancel(link, request_id, epoch)

    # What may happen next. Each action names itself, so that a run reads as a story.

    def work(self) -> list[Action]:
        """What happens when nothing goes wrong, but for timers."""
        actions: list[Action] = []
        for life in self.lives.values():
            if life.engine_calls:
                actions.append((f"{life.id} engine call", lambda life=life: life.engine_calls.popleft()()))
            if life.answers:
                actions.append((f"{life.id} engine answer", lambda life=life: life.answers.popleft()()))
            actions += [(f"{life.id} pull", lambda life=life, p=pull: life.pull_some(p)) for pull in life.pulls]
        actions += [
            (f"message {i}", lambda i=i: self.receive(*self.messages.pop(i))) for i in range(len(self.messages))
        ]
        actions += [(f"ledger {i}", lambda i=i: self.ask(i)) for i in range(len(self.ledger_calls))]
        actions += [(f"ledger answer {i}", lambda i=i: self.tell(i)) for i in range(len(self.ledger_answers))]
        for link in [*self.links.values()]:
            if link.down and not link.broken:
                actions.append((f"{link.instance.id} to router", lambda link=link: self.down(link)))
            if link.up and not link.broken:
                actions.append((f"router to {link.instance.id}", lambda link=link: self.up(link)))
        actions += [("part", lambda link=link: self.part(link)) for link in self.parting]
        return actions

    def steps(self) -> list[Action]:
        """Decode steps, and turns of what was preempted."""
        actions: list[Action] = []
        for life in self.lives.values():
            for request_id, sequence in life.sequences.items():
                if sequence.status == "running":
                    actions.append((f"{life.id} step {request_id}", lambda life=life, r=request_id: life.step(r)))
                elif sequence.status == "waiting" and blocks_for(len(sequence.token_ids)) <= len(life.free):
                    actions.append((f"{life.id} readmit {request_id}", lambda life=life, r=request_id: life.readmit(r)))
        return actions

    def lost_calls(self) -> list[Action]:
        """Calls whose request and answer are no longer on their way, so that only their deadlines end them."""
        on_their_way = {message[1] for _, message in self.messages if message[0] != "abort"}
        lost = [number for number in self.calls if number not in on_their_way]
        return [(f"call {number} times out", lambda n=number: self.fail_call(n)) for number in lost]

    def ask(self, index: int) -> None:
        call = self.ledger_calls.pop(index)
        self.ledger_answers.append((call, self.execute(call)))

    def tell(self, index: int) -> None:
        call, answer = self.ledger_answers.pop(index)
        call.answer(answer)

    def lose_ledger(self) -> None:
        self.entries.clear()
        self.ledger_lost = True

    def down(self, link: Link) -> None:
        output = link.down.popleft()
        self.requests[output.request_id].hear(link, output)

    def timers(self) -> list[Action]:
        actions: list[Action] = []
        for life in self.lives.values():
            for request_id, moving in life.sources.items():
                if moving.timer_at_s is not None:
                    actions.append((f"{life.id} source timer", lambda life=life, r=request_id: self.fire(life, r)))
            for reservation_id, taking in life.targets.items():
                if taking.timer_at_s is not None:
                    actions.append((f"{life.id} target timer", lambda life=life, r=reservation_id: self.fire(life, r)))
        return actions

    def fire(self, life: Instance, key: str) -> None:
        if key in life.sources:
            life.sources[key].timer_at_s = None
            life.on_source(key, TimedOut())
        else:
            life.targets[key].timer_at_s = None
            life.on_target(key, TimedOut())

    def orders(self) -> list[Action]:
        """Migrate commands."""
        return [
            (f"migrate {request_id} {life.id} to {other}", lambda life=life, r=request_id, o=other: life.migrate(r, o))
            for life in self.lives.values()
            for request_id, sequence in life.sequences.items()
            if sequence.status == "running"
            and request_id not in life.sources
            and (running := life.running.get(request_id)) is not None
            and running.link is not None
            and running.epoch == sequence.epoch
            for other in self.lives
            if other != life.id
        ]

    def network_faults(self) -> list[Action]:
        actions: list[Action] = []
        for index, (_, message) in enumerate(self.messages):
            actions.append((f"drop {index}", lambda i=index: self.drop(i)))
            if message[0] != "answer":
                actions.append((f"double {index}", lambda i=index: self.messages.append(self.messages[i])))
        actions += [(f"fail call {number}", lambda n=number: self.fail_call(n)) for number in self.calls]
        for life in self.lives.values():
            actions += [
                ("pull fails", lambda life=life, p=pull: life.pull_ended(p, tr.PullFailed())) for pull in life.pulls
            ]
        return actions

    def drop(self, index: int) -> None:
        del self.messages[index]

    def ledger_faults(self) -> list[Action]:
        actions: list[Action] = []
        for index, call in enumerate(self.ledger_calls):
            actions.append((f"ledger silent {index}", lambda i=index: self.silent(i, done=False)))
            if call.new is not None:
                actions.append((f"ledger silent but done {index}", lambda i=index: self.silent(i, done=True)))
                actions.append((f"ledger silent and late {index}", lambda i=index: self.silent_and_late(i)))
        actions += [(f"late claim {index}", lambda i=index: self.late(i)) for index in range(len(self.late_claims))]
        return actions

    def late(self, index: int) -> None:
        self.execute(self.late_claims.pop(index))

    def preemptions(self) -> list[Action]:
        return [
            (f"{life.id} preempt {request_id}", lambda life=life, r=request_id: life.preempt(r))
            for life in self.lives.values()
            for request_id, sequence in life.sequences.items()
            if sequence.status == "running"
        ]

    def silent(self, index: int, *, done: bool) -> None:
        call = self.ledger_calls.pop(index)
        if done:
            self.execute(call)
        call.answer(LedgerSilent())

    def silent_and_late(self, index: int) -> None:
        call = self.ledger_calls.pop(index)
        self.late_claims.append(call)
        call.answer(LedgerSilent())

    def disasters(self) -> list[Action]:
        actions: list[Action] = [(f"crash {name}", lambda n=name: self.crash(n)) for name in self.lives]
        actions += [
            (f"cut {name}", lambda link=link: self.cut(link)) for name, link in self.links.items() if not link.broken
        ]
        actions += [
            (f"cancel {request.id}", lambda request=request: request.cancel())
            for request in self.requests.values()
            if not request.ended
        ]
        if self.entries:
            actions.append(("ledger loses all", self.lose_ledger))
        return actions

    def add(self, prompt_tokens: int, max_output_tokens: int) -> None:
        request = Request(self, f"q{len(self.requests)}", prompt_tokens, max_output_tokens)
        self.requests[request.id] = request
        request.recover()
