"""The cluster as this router sees it: the ledger's last view, plus what only this router knows. Pure.

Owns three corrections. Requests that it placed after the view was taken count where they went. An instance that
failed it is left alone until it has reported anew. An instance that is gone from the ledger is missing, but only after
a grace in which the instances of a ledger that restarted empty come back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from dataclasses import dataclass

from starmesh.sequence_loads import SequenceLoads
from starmesh.types import ClusterView, InstanceState, InstanceView, Reservation, Role

# A report may be on its way while its sender dies: only one that is younger by this much speaks for its health.
_REPORT_MARGIN_S = 0.5
# How long a failure counts when the ledger is down and no report can be seen.
_SUSPECT_S = 2.0
# Instances register again within a report's interval or two.
_MISSING_GRACE_S = 1.0
# How long a missing instance is remembered, for streams to it that are still silent.
_FORGET_S = 300.0


@dataclass(frozen=True, slots=True)
class _Suspicion:
    incarnation: str
    ledger_s: float
    local_s: float


class LocalView:
    """Times named ``now_s`` are this process's; those of a view are the ledger's."""

    def __init__(self) -> None:
        self.ledger_view = ClusterView(now_s=0.0)
        """What the ledger last said."""
        self._pending: dict[str, dict[str, int]] = {}
        self._suspicions: dict[str, _Suspicion] = {}
        self._absent_since_s: dict[str, float] = {}

    def update(self, view: ClusterView, now_s: float) -> None:
        """Take a new view of the ledger."""
        for former in self.ledger_view.instances:
            self._absent_since_s.setdefault(former.info.instance_id, now_s)
        for instance in view.instances:
            instance_id = instance.info.instance_id
            self._absent_since_s.pop(instance_id, None)
            pending = self._pending.get(instance_id)
            if pending:
                for request_id in pending.keys() & _included(instance):
                    del pending[request_id]
        # An instance that is gone is not chosen, and one that comes back has reported.
        self._suspicions = {
            instance.info.instance_id: suspicion
            for instance in view.instances
            if (suspicion := self._suspicions.get(instance.info.instance_id)) is not None
            and not _answered(suspicion, instance)
        }
        for instance_id, since_s in list(self._absent_since_s.items()):
            if now_s - since_s > _FORGET_S:
                del self._absent_since_s[instance_id]
        self.ledger_view = view

    def add(self, request_id: str, instance_id: str, tokens: int) -> None:
        """Count a request at an instance until a view includes it."""
        self._pending.setdefault(instance_id, {})[request_id] = tokens

    def remove(self, request_id: str, instance_id: str) -> None:
        """Count it no more."""
        pending = self._pending.get(instance_id)
        if pending is not None:
            pending.pop(request_id, None)
            if not pending:
                del self._pending[instance_id]

    def suspect(self, instance_id: str, now_s: float) -> None:
        """Leave an instance alone until it has reported anew or another process has taken its place."""
        for instance in self.ledger_view.instances:
            if instance.info.instance_id == instance_id:
                incarnation, ledger_s = instance.info.incarnation, self.ledger_view.now_s
                self._suspicions[instance_id] = _Suspicion(incarnation, ledger_s, now_s)

    def missing(self, now_s: float) -> set[str]:
        """The instances that were in the ledger and have been gone from it for more than the grace."""
        return {
            instance_id for instance_id, since_s in self._absent_since_s.items() if now_s - since_s >= _MISSING_GRACE_S
        }

    def suspected(self, now_s: float, *, ledger_available: bool) -> set[str]:
        """The instances to leave alone."""
        return {
            instance_id
            for instance_id, suspicion in self._suspicions.items()
            if ledger_available or now_s - suspicion.local_s < _SUSPECT_S
        }

    def avoidable(self, avoid: Set[str], suspected: Set[str]) -> set[str]:
        """Those of ``avoid`` that can be done without: their role has other instances that take work."""
        avoidable: set[str] = set()
        for role in (Role.PREFILL, Role.DECODE):
            ready = {
                view.info.instance_id
                for view in self.ledger_view.of_role(role)
                if view.info.state is InstanceState.READY
            }
            if ready - suspected - avoid:
                avoidable |= ready & avoid
        return avoidable

    def corrected(self, *, without: str = "") -> ClusterView:
        """The last view with this router's own requests counted in, but for what the one named is reserved."""
        view = self.ledger_view
        return ClusterView(view.now_s, tuple(self._with_pending(instance, without) for instance in view.instances))

    def _with_pending(self, instance: InstanceView, without: str) -> InstanceView:
        pending = self._pending.get(instance.info.instance_id)
        if not pending and not without:
            return instance
        now_s = self.ledger_view.now_s
        ours = tuple(
            Reservation(request_id, instance.info.instance_id, tokens, expires_at_s=now_s)
            for request_id, tokens in (pending or {}).items()
        )
        counted = tuple(item for item in instance.reservations + ours if item.request_id != without)
        return instance if counted == instance.reservations else dataclasses.replace(instance, reservations=counted)


def _included(instance: InstanceView) -> set[str]:
    """The requests that a view counts at an instance already."""
    included = {reservation.request_id for reservation in instance.reservations}
    if instance.load is not None:
        included.update(SequenceLoads.of(instance.load.sequences).request_ids)
    return included


def _answered(suspicion: _Suspicion, instance: InstanceView) -> bool:
    return (
        instance.info.incarnation != suspicion.incarnation
        or instance.reported_at_s > suspicion.ledger_s + _REPORT_MARGIN_S
    )
