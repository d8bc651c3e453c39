"""Which instances a request may be placed on now, and why not on the others. Owns no choice between them."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from starmesh.policy.admission import Room
from starmesh.policy.dispatch.decision import (
    Choice,
    DispatchConfig,
    DispatchRequest,
    NoPlacement,
    Skipped,
    SkipReason,
)
from starmesh.sequence_loads import SequenceLoads
from starmesh.types import ClusterView, InstanceState, InstanceView, KvLayout, Role

_id_of = attrgetter("info.instance_id")


class Candidate(NamedTuple):
    """An instance with room. ``tokens`` and ``requests`` count live reservations, so that requests dispatched since its
    last report weigh already; of the tokens these are ``reserved_tokens``."""

    instance: InstanceView
    tokens: int
    requests: int
    reserved_tokens: int

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
    """The instances of a role with room, and why the others are none; of ``layouts``, unless any will do. By id.

    A reason is the first against the instance: those that no wait will mend come first. What has room is admission's
    rule, ``Room``, but in one pass with each number counted once: a router asks twice for each request, of each
    instance. A test holds it to ``Room``.
    """
    now_s, need, watermark = view.now_s, request.need, config.admission.watermark
    excluded, stale_after_s, max_waiting = request.excluded, config.stale_after_s, config.max_waiting_sequences
    least_tokens = most_tokens = need.tokens
    admit_all = config.admission.admit_all and role is not Role.PREFILL
    if role is not Role.PREFILL:
        least_tokens += 1
        most_tokens = least_tokens + max(0, min(need.remaining_output_tokens - 1, config.admission.headroom_tokens))
    ready, usable_layout = InstanceState.READY, None
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    # A sort that finds them ordered, as a view has them, only walks along.
    for instance in sorted([found for found in view.instances if found.info.role is role], key=_id_of):
        info, load, layout = instance.info, instance.load, instance.info.layout
        if info.instance_id in excluded:
            reason = SkipReason.EXCLUDED
        elif info.state is not ready:
            reason = SkipReason.NOT_READY
        elif load is not None and now_s - instance.reported_at_s > stale_after_s:
            reason = SkipReason.STALE
        # Most often all have the same: to look one up in a set costs more than all else here.
        elif layout is None or (layout is not usable_layout and layouts is not None and layout not in layouts):
            reason = SkipReason.LAYOUT_MISMATCH
        else:
            usable_layout, block_tokens = layout, layout.block_tokens
            longest_tokens, max_sequences = info.max_sequence_tokens, info.max_sequences
            reserved_tokens = 0
            for reservation in instance.reservations:
                reserved_tokens += reservation.tokens
            requests = len(instance.reservations)
            if load is None:
                limit_tokens, waiting, tokens = longest_tokens, 0, reserved_tokens
                free_tokens = limit_tokens - reserved_tokens
            else:
                lacking_tokens = SequenceLoads.of(load.sequences).lacking_tokens
                limit_tokens, waiting = load.total_blocks * block_tokens, load.waiting_sequences
                requests += load.running_sequences + waiting
                tokens = load.resident_tokens + lacking_tokens + reserved_tokens
                free_tokens = load.free_blocks * block_tokens - lacking_tokens - reserved_tokens
            if requests:
                free_tokens -= int(limit_tokens * watermark)
            if least_tokens > limit_tokens or (longest_tokens and least_tokens > longest_tokens):
                reason = SkipReason.TOO_LONG
            # Those that wait there, or will: those beyond what it runs at once.
            elif not admit_all and (
                waiting >= max_waiting or (max_sequences and requests - max_sequences >= max_waiting)
            ):
                reason = SkipReason.QUEUE
            elif not admit_all and min(-(-most_tokens // block_tokens) * block_tokens, limit_tokens) > free_tokens:
                reason = SkipReason.NO_BLOCKS
            else:
                candidates.append(Candidate(instance, tokens, requests, reserved_tokens))
                continue
        skipped.append(Skipped(info.instance_id, reason))
    return tuple(candidates), tuple(skipped)


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
