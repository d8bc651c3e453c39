"""The policies by name: how each chooses among the decode instances that have room.

Owns the registry and the pairing with a prefill instance. Owns no screening (``candidates``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType

from starmesh.policy.dispatch.candidates import Candidate, choice_at, find_candidates, layout_of, why_none
from starmesh.policy.dispatch.decision import (
    Decision,
    DispatchConfig,
    DispatchMemory,
    DispatchRequest,
    Skipped,
    SkipReason,
)
from starmesh.policy.dispatch.predicted_load import pick_by_predicted_load
from starmesh.policy.dispatch.predicted_peak import pick_by_predicted_peak, read_reports
from starmesh.types import ClusterView, KvLayout, Role

# Candidates are ordered by id and at least one.
Read = Callable[[tuple[Candidate, ...], DispatchMemory, DispatchConfig], DispatchMemory]
Pick = Callable[[tuple[Candidate, ...], DispatchRequest, DispatchMemory, DispatchConfig], Candidate | None]

# Of equals ``min`` takes the first, which has the lowest id.
_tokens_of = attrgetter("tokens")
_requests_of = attrgetter("requests")


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    """A policy by name: ``pick`` chooses among the decode instances that have room, or None for the request to wait.
    ``read`` gives it the memory that it chooses by. ``uses_estimates`` says whether a request's
    predicted length may change its choice, and ``holds`` whether it lets requests wait though some have room."""

    name: str
    pick: Pick
    uses_estimates: bool = False
    holds: bool = False
    read: Read = lambda candidates, memory, config: memory

    def choose(
        self, view: ClusterView, request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
    ) -> tuple[Decision, DispatchMemory]:
        """Place a request on a prefill and a decode instance that exchange KV."""
        if not self.holds:
            request = dataclasses.replace(request, held_s=math.inf)
        prefills, skipped = find_candidates(view, Role.PREFILL, request, config)
        if not prefills:
            return Decision(reason=why_none(skipped), skipped=skipped), memory
        layouts = {layout_of(candidate) for candidate in prefills}
        decision, memory = self._choose_decode(view, request, memory, config, layouts)
        if decision.decode is None:
            return Decision(reason=decision.reason, skipped=skipped + decision.skipped), memory
        matching = prefills
        if len(layouts) > 1:
            layout = next(i.info.layout for i in view.instances if i.info.instance_id == decision.decode.instance_id)
            matching = tuple(candidate for candidate in prefills if layout_of(candidate) == layout)
            mismatched = (c.instance_id for c in prefills if layout_of(c) != layout)
            skipped += tuple(Skipped(instance_id, SkipReason.LAYOUT_MISMATCH) for instance_id in mismatched)
            skipped = tuple(sorted(skipped, key=lambda skip: skip.instance_id))
        return Decision(
            decode=decision.decode,
            prefill=choice_at(min(matching, key=_tokens_of), request, config),
            skipped=skipped + decision.skipped,
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
        """Place a request, whose KV is ready under ``layout``, on a decode instance alone. It does not wait where some
        have room: its KV takes room already."""
        request = dataclasses.replace(request, held_s=math.inf)
        return self._choose_decode(view, request, memory, config, {layout})

    def _choose_decode(
        self,
        view: ClusterView,
        request: DispatchRequest,
        memory: DispatchMemory,
        config: DispatchConfig,
        layouts: set[KvLayout | None],
    ) -> tuple[Decision, DispatchMemory]:
        candidates, skipped = find_candidates(view, Role.DECODE, request, config, layouts=layouts)
        if not candidates:
            return Decision(reason=why_none(skipped), skipped=skipped), memory
        memory = self.read(candidates, memory, config)
        chosen = self.pick(candidates, request, memory, config)
        if chosen is None:
            held = tuple(Skipped(candidate.instance_id, SkipReason.PEAK) for candidate in candidates)
            skipped = tuple(sorted((*skipped, *held), key=lambda skip: skip.instance_id))
            return Decision(reason=why_none(skipped), skipped=skipped), memory
        decision = Decision(decode=choice_at(chosen, request, config), skipped=skipped)
        return decision, dataclasses.replace(memory, last_decode_id=chosen.instance_id)


def _round_robin(
    candidates: tuple[Candidate, ...], request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
) -> Candidate:
    """The next id after the last one chosen: a counter would favour some whenever instances come and go."""
    later = (candidate for candidate in candidates if candidate.instance_id > memory.last_decode_id)
    return next(later, candidates[0])


def _least_requests(
    candidates: tuple[Candidate, ...], request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
) -> Candidate:
    return min(candidates, key=_requests_of)


def _least_tokens(
    candidates: tuple[Candidate, ...], request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
) -> Candidate:
    return min(candidates, key=_tokens_of)


def _power_of_two(
    candidates: tuple[Candidate, ...], request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
) -> Candidate:
    """The one with fewer tokens of two that the request's id draws: routers that act on the same view do not all run
    to the same instance. (Mitzenmacher, The Power of Two Choices in Randomized Load Balancing, 2001.)"""
    count = len(candidates)
    if count == 1:
        return candidates[0]
    drawn = int.from_bytes(hashlib.blake2b(request.request_id.encode(), digest_size=16).digest(), "big")
    first = drawn % count
    # Any of the others, each as likely.
    second = (first + 1 + drawn // count % (count - 1)) % count
    return min(candidates[min(first, second)], candidates[max(first, second)], key=_tokens_of)


POLICIES: Mapping[str, DispatchPolicy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            DispatchPolicy("round_robin", _round_robin),
            DispatchPolicy("least_requests", _least_requests),
            DispatchPolicy("least_tokens", _least_tokens),
            DispatchPolicy("power_of_two", _power_of_two),
            DispatchPolicy("predicted_load", pick_by_predicted_load, uses_estimates=True, read=read_reports),
            DispatchPolicy("predicted_peak", pick_by_predicted_peak, uses_estimates=True, read=read_reports),
            DispatchPolicy("held_peak", pick_by_predicted_peak, uses_estimates=True, holds=True, read=read_reports),
        )
    }
)
