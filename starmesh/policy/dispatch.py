"""Dispatch: which prefill and which decode instance a request gets first, and why not the others.

Pure: the view, the request and the memory of earlier choices come in; a decision with reasons and the new memory go
out. Instances are taken in the order of their ids, whatever the view's. ``POLICIES`` holds the policies by name; they
differ in how they choose among the decode instances that have room. Prefill instances are always chosen by the fewest
outstanding prompt tokens, since prefill time is linear in them. Owns no reservation and no queue.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from starmesh.policy.admission import AdmissionConfig, Need, Room, lacking_tokens
from starmesh.types import ClusterView, InstanceState, InstanceView, KvLayout, Role


class SkipReason(Enum):
    """Why an instance was not considered."""

    EXCLUDED = "excluded"
    """The caller ruled it out: it has just failed or refused this request."""
    NOT_READY = "not_ready"
    STALE = "stale"
    """Its last report is too old to go by."""
    LAYOUT_MISMATCH = "layout_mismatch"
    """No usable instance of the other role exchanges KV with it."""
    TOO_LONG = "too_long"
    """It could not hold the request even if it were empty."""
    QUEUE = "queue"
    """Enough requests wait there already."""
    NO_BLOCKS = "no_blocks"


class NoPlacement(Enum):
    """Why a request has no place."""

    NO_INSTANCE = "no_instance"
    """None is there that could serve it, now or after a wait for room."""
    ALL_DRAINING = "all_draining"
    NO_CAPACITY = "no_capacity"
    """Some would serve it with more room: wait."""
    TOO_LONG = "too_long"
    """No instance will ever hold it."""


@dataclass(frozen=True, slots=True)
class DispatchConfig:
    """Bounds of what is considered. ``max_waiting_sequences`` wait on an instance at most: what waits there can no
    longer go elsewhere, while what waits in the router can."""

    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    stale_after_s: float = 5.0
    max_waiting_sequences: int = 16


@dataclass(frozen=True, slots=True)
class DispatchRequest:
    """What is to be placed. Instances in ``excluded`` have failed or refused it."""

    request_id: str
    need: Need
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class DispatchMemory:
    """What a policy remembers from one choice to the next."""

    last_decode_id: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """An instance, and the reservation to make there."""

    instance_id: str
    reserve_tokens: int
    limit_tokens: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """An instance that was not considered."""

    instance_id: str
    reason: SkipReason


@dataclass(frozen=True, slots=True)
class Decision:
    """``reason`` is None exactly when what was asked for (both, or the decode instance alone) is chosen; otherwise
    nothing is. ``skipped`` is ordered by role, prefill first, then id."""

    decode: Choice | None = None
    prefill: Choice | None = None
    reason: NoPlacement | None = None
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """An instance with room. ``tokens`` and ``requests`` count live reservations, so that requests dispatched since its
    last report weigh already."""

    instance: InstanceView
    tokens: int
    requests: int

    @property
    def instance_id(self) -> str:
        """The instance's id."""
        return self.instance.info.instance_id


# Candidates are ordered by id and at least one.
Pick = Callable[[tuple[Candidate, ...], str, DispatchMemory], Candidate]


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    """A policy by name: ``pick`` chooses among the decode instances that have room, given the request's id."""

    name: str
    pick: Pick

    def choose(
        self, view: ClusterView, request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
    ) -> tuple[Decision, DispatchMemory]:
        """Place a request on a prefill and a decode instance that exchange KV."""
        prefills, skipped = _candidates(view, Role.PREFILL, request, config)
        if not prefills:
            return Decision(reason=_why_none(skipped), skipped=skipped), memory
        layouts = {_layout(candidate) for candidate in prefills}
        decision, memory = self._choose_decode(view, request, memory, config, layouts)
        skipped += decision.skipped
        if decision.decode is None:
            return Decision(reason=decision.reason, skipped=skipped), memory
        layout = next(i.info.layout for i in view.instances if i.info.instance_id == decision.decode.instance_id)
        matching = [candidate for candidate in prefills if _layout(candidate) == layout]
        mismatched = (c.instance_id for c in prefills if _layout(c) != layout)
        skipped += tuple(Skipped(instance_id, SkipReason.LAYOUT_MISMATCH) for instance_id in mismatched)
        order = {instance.info.instance_id: instance.info.role is Role.DECODE for instance in view.instances}
        prefill = min(matching, key=lambda candidate: (candidate.tokens, candidate.instance_id))
        return Decision(
            decode=decision.decode,
            prefill=_choice(prefill, request, config),
            skipped=tuple(sorted(skipped, key=lambda skip: (order[skip.instance_id], skip.instance_id))),
        ), memory

    def choose_decode(
        self,
        view: ClusterView,
        request: DispatchRequest,
        memory: DispatchMemory,
        config: DispatchConfig,
        *,
        layout: KvLayout,
    ) -> tuple[Decision, DispatchMemory]:
        """Place a request, whose KV is ready under ``layout``, on a decode instance alone."""
        return self._choose_decode(view, request, memory, config, {layout})

    def _choose_decode(
        self,
        view: ClusterView,
        request: DispatchRequest,
        memory: DispatchMemory,
        config: DispatchConfig,
        layouts: set[KvLayout | None],
    ) -> tuple[Decision, DispatchMemory]:
        candidates, skipped = _candidates(view, Role.DECODE, request, config, layouts=layouts)
        if not candidates:
            return Decision(reason=_why_none(skipped), skipped=skipped), memory
        chosen = self.pick(candidates, request.request_id, memory)
        decision = Decision(decode=_choice(chosen, request, config), skipped=skipped)
        return decision, DispatchMemory(last_decode_id=chosen.instance_id)


def _candidates(
    view: ClusterView,
    role: Role,
    request: DispatchRequest,
    config: DispatchConfig,
    *,
    layouts: set[KvLayout | None] | None = None,
) -> tuple[tuple[Candidate, ...], tuple[Skipped, ...]]:
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    for instance in sorted(view.of_role(role), key=lambda instance: instance.info.instance_id):
        reason = _skip_reason(instance, view.now_s, request, config, layouts)
        if reason is None:
            candidates.append(_candidate(instance))
        else:
            skipped.append(Skipped(instance.info.instance_id, reason))
    return tuple(candidates), tuple(skipped)


def _skip_reason(
    instance: InstanceView,
    now_s: float,
    request: DispatchRequest,
    config: DispatchConfig,
    layouts: set[KvLayout | None] | None,
) -> SkipReason | None:
    """The first reason against an instance: those that no wait will mend come first."""
    info, load = instance.info, instance.load
    room = Room(instance, config.admission)
    if info.instance_id in request.excluded:
        return SkipReason.EXCLUDED
    if info.state is not InstanceState.READY:
        return SkipReason.NOT_READY
    if load is not None and now_s - instance.reported_at_s > config.stale_after_s:
        return SkipReason.STALE
    if info.layout is None or (layouts is not None and info.layout not in layouts):
        return SkipReason.LAYOUT_MISMATCH
    if not room.fits(request.need):
        return SkipReason.TOO_LONG
    if _waiting(instance) >= config.max_waiting_sequences:
        return SkipReason.QUEUE
    return None if room.has_room(request.need) else SkipReason.NO_BLOCKS


def _waiting(instance: InstanceView) -> int:
    """Requests that wait there, or will: those beyond what it runs at once."""
    waiting = 0 if instance.load is None else instance.load.waiting_sequences
    most = instance.info.max_sequences
    return max(waiting, _requests(instance) - most) if most else waiting


def _requests(instance: InstanceView) -> int:
    running = 0 if instance.load is None else instance.load.running_sequences + instance.load.waiting_sequences
    return running + len(instance.reservations)


def _candidate(instance: InstanceView) -> Candidate:
    resident = 0 if instance.load is None else instance.load.resident_tokens
    return Candidate(
        instance=instance,
        tokens=resident + lacking_tokens(instance) + instance.reserved_tokens,
        requests=_requests(instance),
    )


def _choice(candidate: Candidate, request: DispatchRequest, config: DispatchConfig) -> Choice:
    room = Room(candidate.instance, config.admission)
    return Choice(candidate.instance_id, room.reserve_tokens(request.need), room.limit_tokens)


def _layout(candidate: Candidate) -> KvLayout | None:
    return candidate.instance.info.layout


def _why_none(skipped: tuple[Skipped, ...]) -> NoPlacement:
    """What the reasons against all instances of a role come to; excluded ones have no say."""
    reasons = {skip.reason for skip in skipped} - {SkipReason.EXCLUDED}
    if reasons & {SkipReason.QUEUE, SkipReason.NO_BLOCKS}:
        return NoPlacement.NO_CAPACITY
    if reasons == {SkipReason.NOT_READY}:
        return NoPlacement.ALL_DRAINING
    if reasons == {SkipReason.TOO_LONG}:
        return NoPlacement.TOO_LONG
    return NoPlacement.NO_INSTANCE


def _round_robin(candidates: tuple[Candidate, ...], request_id: str, memory: DispatchMemory) -> Candidate:
    """The next id after the last one chosen: a counter would favour some whenever instances come and go."""
    later = (candidate for candidate in candidates if candidate.instance_id > memory.last_decode_id)
    return next(later, candidates[0])


def _least_requests(candidates: tuple[Candidate, ...], request_id: str, memory: DispatchMemory) -> Candidate:
    return min(candidates, key=lambda candidate: (candidate.requests, candidate.instance_id))


def _least_tokens(candidates: tuple[Candidate, ...], request_id: str, memory: DispatchMemory) -> Candidate:
    return min(candidates, key=lambda candidate: (candidate.tokens, candidate.instance_id))


def _power_of_two(candidates: tuple[Candidate, ...], request_id: str, memory: DispatchMemory) -> Candidate:
    """The one with fewer tokens of two that the request's id draws: routers that act on the same view do not all run
    to the same instance. (Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001.)"""
    count = len(candidates)
    if count == 1:
        return candidates[0]
    drawn = int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=16).digest(), "big")
    first = drawn % count
    # Any of the others, each as likely.
    second = (first + 1 + drawn // count % (count - 1)) % count
    return _least_tokens((candidates[first], candidates[second]), request_id, memory)


POLICIES: Mapping[str, DispatchPolicy] = MappingProxyType(
    {
        name: DispatchPolicy(name, pick)
        for name, pick in (
            ("round_robin", _round_robin),
            ("least_requests", _least_requests),
            ("least_tokens", _least_tokens),
            ("power_of_two", _power_of_two),
        )
    }
)
