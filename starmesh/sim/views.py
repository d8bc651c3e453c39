"""What the router, the rescheduler and the instances know of the cluster: reports, as old as they are live.

Owns the reports, what is reserved beyond them, and the predictions that they carry. An instance's report is made when
it is asked for, or when somebody looks and the last one is older than the interval: a cluster that nobody looks at
costs nothing. The rescheduler and the instances read the last reports; the router goes by those that there were when
it last looked, and adds its own requests since. Owns no decision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from starmesh.sequence_loads import COUNTS, SequenceLoads
from starmesh.sim.events import EventLoop
from starmesh.sim.instance import SimulatedInstance
from starmesh.sim.predictors import SimulatedPredictor
from starmesh.types import ClusterView, InstanceLoad, InstanceView, Reservation, Role

Integers = npt.NDArray[np.int64]

_OUTPUT_TOKENS = COUNTS.index("output_tokens")
_REMAINING = COUNTS.index("remaining_tokens")
_FOREVER_S = float("inf")


@dataclass(slots=True)
class _Reported:
    """One instance: its last report, the last one that a router's look before that of ``look`` may have found, and what
    the router has placed there that it has found in none. ``view`` and ``routed`` are made anew after any of them has
    changed, ``routed`` also at the next look."""

    instance: SimulatedInstance
    load: InstanceLoad
    reported_at_s: float
    look: int
    former_load: InstanceLoad
    former_at_s: float = -math.inf
    pending: dict[str, Reservation] = field(default_factory=dict)
    view: InstanceView | None = None
    routed: InstanceView | None = None
    routed_look: int = -1
    request_ids: tuple[str, ...] = ()
    facts: Integers | None = None


class Views:
    """The ledger's view and the router's own counts in one.

    ``facts_of`` gives a request's (number, output tokens that it will have, most that it may have): what a predictor
    is asked with.
    """

    def __init__(
        self,
        loop: EventLoop,
        *,
        report_interval_s: float,
        look_interval_s: float,
        block_tokens: int,
        predictor: SimulatedPredictor | None,
        facts_of: Callable[[str], tuple[int, int, int]],
        migrations_of: Callable[[str], tuple[int, int]],
    ) -> None:
        self.block_tokens = block_tokens
        self._loop = loop
        self._interval_s = report_interval_s
        self._look_s = look_interval_s
        self._predictor = predictor
        self._facts_of = facts_of
        self._migrations_of = migrations_of
        self._known: dict[str, _Reported] = {}
        # Gathered anew when instances come and go, not at each dispatch.
        self._of_roles: dict[frozenset[Role], list[_Reported]] = {}

    def add(self, instance: SimulatedInstance) -> None:
        """An instance registers, and reports at once."""
        empty = InstanceLoad(0, 0)
        known = _Reported(instance, empty, self._loop.now_s, self._look, empty)
        self._known[instance.info.instance_id] = known
        self._known = dict(sorted(self._known.items()))
        self._of_roles.clear()
        self._report([known])

    def remove(self, instance_id: str) -> None:
        """An instance is gone."""
        self._known.pop(instance_id, None)
        self._of_roles.clear()

    def place(self, request_id: str, instance_id: str, tokens: int) -> None:
        """Count a request at an instance until a report includes it."""
        known = self._known.get(instance_id)
        if known is not None:
            known.pending[request_id] = Reservation(request_id, instance_id, tokens, _FOREVER_S)
            known.view = known.routed = None

    def release(self, request_id: str, instance_id: str | None) -> None:
        """Count it no more."""
        known = self._known.get(instance_id or "")
        if known is not None and known.pending.pop(request_id, None) is not None:
            known.view = known.routed = None

    def report(self, instance_id: str) -> None:
        """An instance reports at once and not at the end of its interval, as it does live when a sequence has ended
        there or has moved."""
        known = self._known.get(instance_id)
        if known is not None:
            self._report([known])

    def states_changed(self) -> None:
        """Some instance has another state than before."""
        for known in self._known.values():
            known.view = known.routed = None

    def of(self, roles: Iterable[Role]) -> ClusterView:
        """The instances of these roles as the ledger has them, ordered by id."""
        views = tuple(each.view or _view(each) for each in self._reported(roles))
        return ClusterView(self._loop.now_s, views)

    def routed(self, roles: Iterable[Role], *, without: str = "") -> ClusterView:
        """The same as the router has them; reservations of the request ``without`` left out."""
        known, look = self._reported(roles), self._look
        views = [
            each.routed if each.routed is not None and each.routed_look == look else self._routed(each, look)
            for each in known
        ]
        if without:
            for at, each in enumerate(known):
                if without in each.pending:
                    views[at] = _without(views[at], without)
        return ClusterView(self._loop.now_s, tuple(views))

    @property
    def _look(self) -> int:
        """The number of the router's last look; a moment's own look comes before all else that happens then."""
        return int(self._loop.now_s / self._look_s + 1e-9)

    def _reported(self, roles: Iterable[Role]) -> list[_Reported]:
        """The instances of these roles, none with a report older than the interval."""
        wanted = frozenset(roles)
        known = self._of_roles.get(wanted)
        if known is None:
            known = [each for each in self._known.values() if each.instance.info.role in wanted]
            self._of_roles[wanted] = known
        now_s, interval_s = self._loop.now_s, self._interval_s
        due = [each for each in known if now_s - each.reported_at_s >= interval_s]
        if due:
            self._report(due)
        return known

    def _routed(self, known: _Reported, look: int) -> InstanceView:
        load, reported_at_s = known.load, known.reported_at_s
        # One that is older than live ones ever are is no likeness of what a look would have found.
        if known.look >= look and self._loop.now_s - known.former_at_s <= self._interval_s + self._look_s:
            load, reported_at_s = known.former_load, known.former_at_s
        if known.pending:
            here = frozenset(SequenceLoads.of(load.sequences).request_ids)
            known.pending = {name: kept for name, kept in known.pending.items() if name not in here}
        known.routed = InstanceView(known.instance.info, load, reported_at_s, tuple(known.pending.values()))
        known.routed_look = look
        return known.routed

    def load_now(self, instance_id: str) -> InstanceLoad:
        """An instance's own load with what is predicted of it, as of now."""
        known = self._known[instance_id]
        self._report([known])
        return known.load

    def loads(self) -> Mapping[str, InstanceLoad]:
        """The decode instances' loads as they are, for an onlooker: nobody in the cluster sees that he looks."""
        return {
            name: known.instance.load()
            for name, known in self._known.items()
            if known.instance.info.role is Role.DECODE
        }

    def _report(self, reporting: list[_Reported]) -> None:
        """These instances report. Together: one question to the predictor costs little more than for one of them."""
        look = self._look
        loads = [known.instance.load() for known in reporting]
        sequences = [SequenceLoads.of(load.sequences) for load in loads]
        predicted = self._predicted(reporting, sequences)
        for known, load, listed in zip(reporting, loads, predicted, strict=True):
            outgoing, incoming = self._migrations_of(known.instance.info.instance_id)
            if listed is not load.sequences or outgoing or incoming:
                load = dataclasses.replace(
                    load, outgoing_migrations=outgoing, incoming_migrations=incoming, sequences=listed
                )
            if known.look < look:
                known.former_load, known.former_at_s = known.load, known.reported_at_s
            known.load, known.reported_at_s, known.look = load, self._loop.now_s, look
            known.view = known.routed = None

    def _predicted(self, reporting: list[_Reported], sequences: list[SequenceLoads]) -> list[SequenceLoads]:
        """The same sequences with estimates, where there is a predictor and they decode."""
        if self._predictor is None:
            return sequences
        asked = [
            place
            for place, (known, listed) in enumerate(zip(reporting, sequences, strict=True))
            if known.instance.info.role is Role.DECODE and len(listed)
        ]
        if not asked:
            return sequences
        facts = np.concatenate([self._facts(reporting[place], sequences[place]) for place in asked], axis=1)
        output = b"".join([sequences[place].columns[_OUTPUT_TOKENS] for place in asked])
        answers = self._predictor.remaining(facts[0], np.frombuffer(output, dtype=np.int64), facts[1], facts[2])
        estimates = [column.tobytes() for column in answers]
        found, begin = list(sequences), 0
        for place in asked:
            listed = sequences[place]
            end = begin + 8 * len(listed)
            columns = list(listed.columns)
            columns[_REMAINING : _REMAINING + 3] = [column[begin:end] for column in estimates]
            found[place] = SequenceLoads.of_buffers(listed.request_ids, columns)
            begin = end
        return found

    def _facts(self, known: _Reported, sequences: SequenceLoads) -> Integers:
        """What the predictor is asked with, [3, sequences]; gathered anew when others run."""
        if known.facts is None or sequences.request_ids is not known.request_ids:
            known.facts = np.array([self._facts_of(name) for name in sequences.request_ids], dtype=np.int64).T
            known.request_ids = sequences.request_ids
        return known.facts


def _view(known: _Reported) -> InstanceView:
    # The ledger drops a reservation with the report that includes the request.
    here = frozenset(SequenceLoads.of(known.load.sequences).request_ids) if known.pending else frozenset()
    reservations = tuple(kept for name, kept in known.pending.items() if name not in here)
    known.view = InstanceView(known.instance.info, known.load, known.reported_at_s, reservations)
    return known.view


def _without(view: InstanceView, request_id: str) -> InstanceView:
    kept = tuple(item for item in view.reservations if item.request_id != request_id)
    return dataclasses.replace(view, reservations=kept)
