"""The decode instance that is least loaded among those whose memory will do, by the peak of KV over time; and when to
let a request wait rather than to place it.

An instance fits if its blocks hold the predicted peak (``policy.peak``) of its sequences, of what is reserved there and
of the request. Of those that fit the one of the least mean load over the time that the request is predicted to stay is
taken. Where none fits, ``predicted_peak`` takes the one that lacks least, and ``held_peak`` holds the request in the
router's queue: placed, it would cost it or another a preemption, and while it waits in the router it can still go
anywhere. It is held until one fits, until one is nearly idle, or until it has been the first in the queue for
``hold_s``; not if its KV waits at a prefill instance already. Admission's own rule (room for the prompt and some
output) holds in any case.

A request of which nothing is predicted is taken to generate as much as those that run still do on average, and never
more than it may; so is what is reserved.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from starmesh.policy.dispatch.candidates import Candidate
from starmesh.policy.dispatch.decision import DispatchConfig, DispatchMemory, DispatchRequest
from starmesh.policy.dispatch.outlook import Reading, outlooks_of
from starmesh.policy.forecast import Integers, token_steps
from starmesh.policy.peak import peak_blocks, taken_remaining

# Most often one of the least loaded fits: only then that of all is looked at.
_FIRST_LOOK = 8
_NEARLY_IDLE = 4
"""An instance that would use at most one in so many of its blocks now is nearly idle. Our choice."""


def read_reports(candidates: tuple[Candidate, ...], memory: DispatchMemory, config: DispatchConfig) -> DispatchMemory:
    """The memory with the outlooks of these candidates."""
    reading = Reading(config.peak_caution, config.max_prediction_age_tokens, config.admission.watermark)
    instances = (candidate.instance for candidate in candidates)
    return DispatchMemory(memory.last_decode_id, outlooks_of(instances, memory.outlooks, reading))


def pick_by_predicted_peak(
    candidates: tuple[Candidate, ...], request: DispatchRequest, memory: DispatchMemory, config: DispatchConfig
) -> Candidate | None:
    """None to hold the request. Of equals the one that the request has a place on already, then the lowest id. The
    memory is one of ``read_reports``."""
    typical = _typical(candidates, memory, config)
    own = _own(request, typical, config)
    alike: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        assert candidate.instance.info.layout is not None
        alike[candidate.instance.info.layout.block_tokens].append(candidate)
    rated: list[tuple[int, int, bool, str, Candidate]] = []
    for block_tokens, members in alike.items():
        # The request's next step stores the token that it comes with, too.
        crowd = _crowd(members, memory, block_tokens, typical=typical).with_each(request.need.tokens + 1, own)
        loads = crowd.loads(min(max(own, config.min_horizon_steps), config.max_horizon_steps))
        elsewhere = np.array([member.instance_id != request.placed_id for member in members])
        # Members are ordered by id and the sort is stable: ties by id.
        order = np.lexsort((elsewhere, loads))
        for some in (order[:_FIRST_LOOK], order[_FIRST_LOOK:]):
            lacking = crowd.lacking_blocks(some)
            for row, lacks in zip(some.tolist(), lacking.tolist(), strict=True):
                member = members[row]
                rated.append((lacks, int(loads[row]), bool(elsewhere[row]), member.instance_id, member))
            if not lacking.all():
                break
    lacks, *_, best = min(rated, key=lambda rating: rating[:4])
    return best if lacks == 0 or request.held_s >= config.hold_s else None


@dataclass(frozen=True, slots=True, eq=False)
class _Crowd:
    """What is on some instances, arrays [sequences]: ``owner`` says on which. ``blocks`` [instances] may be used."""

    tokens: Integers
    remaining: Integers
    owner: Integers
    blocks: Integers
    block_tokens: int

    def with_each(self, tokens: int, remaining: int) -> _Crowd:
        """The same with one sequence more on each instance."""
        each = np.arange(len(self.blocks))
        return _Crowd(
            tokens=np.concatenate((self.tokens, np.full_like(each, tokens))),
            remaining=np.concatenate((self.remaining, np.full_like(each, remaining))),
            owner=np.concatenate((self.owner, each)),
            blocks=self.blocks,
            block_tokens=self.block_tokens,
        )

    def loads(self, steps: int) -> Integers:
        """Tokens held over the coming steps, summed, [instances]."""
        weights = token_steps(self.tokens, self.remaining, steps)
        loads: Integers = np.bincount(self.owner, weights=weights, minlength=len(self.blocks)).astype(np.int64)
        return loads

    def lacking_blocks(self, instances: Integers) -> Integers:
        """How many blocks each of these will lack at the worst, [instances]; a nearly idle one lacks none."""
        place = np.full(len(self.blocks), -1)
        place[instances] = np.arange(len(instances))
        here = place[self.owner] >= 0
        tokens, remaining, owner = self.tokens[here], self.remaining[here], place[self.owner[here]]
        peaks = peak_blocks(tokens, remaining, owner, len(instances), self.block_tokens)
        now = np.bincount(owner, weights=-(-tokens // self.block_tokens), minlength=len(instances))
        lacking = (peaks - self.blocks[instances]).clip(min=0)
        return np.where(now * _NEARLY_IDLE <= self.blocks[instances], 0, lacking)


def _typical(candidates: tuple[Candidate, ...], memory: DispatchMemory, config: DispatchConfig) -> int:
    """What those that run still generate on average; where nothing runs, the default horizon."""
    taken = np.concatenate([memory.outlooks[candidate.instance_id].taken for candidate in candidates])
    return int(taken.sum()) // len(taken) if len(taken) else config.horizon_steps


def _own(request: DispatchRequest, typical: int, config: DispatchConfig) -> int:
    """What the request is taken to generate."""
    limit, estimate = request.need.remaining_output_tokens, request.estimate
    if estimate is None or estimate.remaining_tokens <= 0:
        return min(typical, limit)
    foreseen = (0, estimate.remaining_tokens, estimate.remaining_tokens_upper, 0, limit)
    columns = (np.array([count], dtype=np.int64) for count in foreseen)
    return int(taken_remaining(*columns, caution=config.peak_caution, max_age_tokens=0)[0])


def _crowd(members: list[Candidate], memory: DispatchMemory, block_tokens: int, *, typical: int) -> _Crowd:
    outlooks = [memory.outlooks[member.instance_id] for member in members]
    reserved = [(row, known.tokens) for row, member in enumerate(members) for known in member.instance.reservations]
    rows, tokens = np.array(reserved, dtype=np.int64).reshape(-1, 2).T
    each = np.repeat(np.arange(len(members)), [len(outlook.tokens) for outlook in outlooks])
    return _Crowd(
        tokens=np.concatenate((*(outlook.tokens for outlook in outlooks), tokens)),
        remaining=np.concatenate((*(outlook.taken for outlook in outlooks), np.full(len(rows), typical))),
        owner=np.concatenate((each, rows)),
        blocks=np.array([outlook.blocks for outlook in outlooks]),
        block_tokens=block_tokens,
    )
