"""Which instances a request may be placed on now, and why not on the others. Owns no choice between them."""

from __future__ import annotations

from dataclasses import dataclass

from starmesh.policy.admission import Room, lacking_tokens
from starmesh.policy.dispatch.decision import (
    Choice,
    DispatchConfig,
    DispatchRequest,
    NoPlacement,
    Skipped,
    SkipReason,
)
from starmesh.types import ClusterView, InstanceState, InstanceView, KvLayout, Role


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


def find_candidates(
    view: ClusterView,
    role: Role,
    request: DispatchRequest,
    config: DispatchConfig,
    *,
    layouts: set[KvLayout | None] | None = None,
) -> tuple[tuple[Candidate, ...], tuple[Skipped, ...]]:
    """The instances of a role with room, and why the others are none; of ``layouts``, unless any will do. By id."""
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


def choice_at(candidate: Candidate, request: DispatchRequest, config: DispatchConfig) -> Choice:
    """What to reserve there for the request."""
    room = Room(candidate.instance, config.admission)
    return Choice(candidate.instance_id, room.reserve_tokens(request.need), room.limit_tokens)


def layout_of(candidate: Candidate) -> KvLayout | None:
    """How its KV blocks are laid out."""
    return candidate.instance.info.layout


def why_none(skipped: tuple[Skipped, ...]) -> NoPlacement:
    """What the reasons against all instances of a role come to; excluded ones have no say."""
    reasons = {skip.reason for skip in skipped} - {SkipReason.EXCLUDED}
    if reasons & {SkipReason.QUEUE, SkipReason.NO_BLOCKS, SkipReason.PEAK}:
        return NoPlacement.NO_CAPACITY
    if reasons == {SkipReason.NOT_READY}:
        return NoPlacement.ALL_DRAINING
    if reasons == {SkipReason.TOO_LONG}:
        return NoPlacement.TOO_LONG
    return NoPlacement.NO_INSTANCE
