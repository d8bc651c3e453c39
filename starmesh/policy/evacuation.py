"""Evacuation: what an instance decides by itself when it must give sequences up, without waiting for the rescheduler.

Two plain functions, with the rescheduler's own steps, limits and reasons:

- ``drain_plan``: the instance is about to go. Everything that decodes moves away.
- ``relief_plan``: it is about to run out of blocks. The fewest sequences move by which it holds the others.

The caller is the source of all these moves. It keeps a ``PlanMemory`` of the migrations that it has begun itself, for
whatever reason and on whose command ever, and passes it in with each call:

    decided = drain_plan(view, "decode-0", load, memory, config)
    memory = decided.memory                   # these count as under way from now on
    for migration in decided.migrations: ...  # begin each, in this order
    memory = memory.succeeded(request_id, duration_s=..., now_s=..., config=config)  # or .failed, or .withdrawn

and calls again whenever one of them ends or a new view comes, until nothing is left. ``view`` is the ledger's, ``load``
the instance's own as of now (the view's may be half a second old); times are the view's. Of the config count
``max_in_flight_per_source`` and ``_per_target``, the cool-downs after failures, the horizon and the other bounds
of a target; not the policy, and not ``max_in_flight``, for an instance in need does not wait for others. What should
move and cannot is in ``Plan.skipped`` with its reason: NOT_DECODING and BUDGET will have their turn, NO_TARGET and
NO_ROOM may never. Takes as long as a round of rescheduling. Owns no clock and begins nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from starmesh.policy.rescheduling import Plan, PlanMemory, ReschedulingConfig, SequenceSkip, SkippedSequences
from starmesh.policy.rescheduling.measure import measure, reported_owners, usable_instances
from starmesh.policy.rescheduling.relief import empty, unburden
from starmesh.policy.rescheduling.round import Round
from starmesh.policy.rescheduling.sequences import Foresight
from starmesh.types import ClusterView, InstanceLoad, InstanceState, InstanceView


def drain_plan(
    view: ClusterView, instance_id: str, load: InstanceLoad, memory: PlanMemory, config: ReschedulingConfig
) -> Plan:
    """Where the instance's sequences go, as many as may start now. Those that last longest for each token to copy go
    first, each to the target with room whose load suffers least."""
    return _decide(view, instance_id, load, memory, config, name="drain", state=InstanceState.DRAINING, choose=empty)


def relief_plan(
    view: ClusterView,
    instance_id: str,
    load: InstanceLoad,
    memory: PlanMemory,
    config: ReschedulingConfig,
    *,
    steps: int,
    preempted_first: Sequence[str] = (),
) -> Plan:
    """Which sequences go, and where, so that the instance holds the others over its next ``steps`` decode steps.

    ``steps``: how long it would take to be rid of a sequence, so about the steps of a migration; the targets are held
    to ``memory_horizons`` horizons. ``preempted_first`` are the request ids in the order in which the scheduler would
    preempt them. As few go as possible; of those that help alike the one that would be preempted first, and then the
    one with the fewest tokens. Nothing moves while everything fits, and nothing that ends before its transfer pays;
    what need not move has no reason.
    """
    ranks = {request_id: rank for rank, request_id in enumerate(preempted_first)}

    def choose(round_: Round, source: int) -> None:
        unburden(round_, source, steps, ranks, urgent=True)

    return _decide(view, instance_id, load, memory, config, name="relief", state=InstanceState.READY, choose=choose)


def _decide(
    view: ClusterView,
    instance_id: str,
    load: InstanceLoad,
    memory: PlanMemory,
    config: ReschedulingConfig,
    *,
    name: str,
    state: InstanceState,
    choose: Callable[[Round, int], None],
) -> Plan:
    own = [
        _as_it_is(found, load, state, view.now_s) for found in view.instances if found.info.instance_id == instance_id
    ]
    others = [found for found in view.instances if found.info.instance_id != instance_id]
    usable, skipped_instances = usable_instances(ClusterView(view.now_s, (*own, *others)), config)
    for instances in usable:
        group = measure(instances, config, Foresight.RESOLVED)
        if instance_id not in group.index:
            continue
        remembered = group.sequences.rows_named(memory.request_ids)
        owners = reported_owners([group], [remembered])
        memory = memory.reconciled(owners, now_s=view.now_s, config=config)
        # The slots of both ends bound what may start.
        round_ = Round(group, memory, remembered, now_s=view.now_s, budget=config.max_in_flight_per_source)
        choose(round_, group.index[instance_id])
        return Plan(
            policy=name,
            memory=memory.started(tuple(round_.migrations)),
            migrations=tuple(entry.migration for entry in round_.migrations),
            skipped_instances=skipped_instances,
            skipped=round_.skipped(),
            spread_before_tokens=round_.spread_before,
            spread_after_tokens=round_.spread,
        )
    everything = frozenset(sequence.request_id for sequence in load.sequences)
    nowhere = SkippedSequences(instance_id, SequenceSkip.NO_TARGET, everything)
    return Plan(
        policy=name,
        memory=memory.reconciled({}, now_s=view.now_s, config=config),
        skipped_instances=skipped_instances,
        skipped=(nowhere,) if everything else (),
    )


def _as_it_is(found: InstanceView, load: InstanceLoad, state: InstanceState, now_s: float) -> InstanceView:
    """The instance itself: reported now, and in the state that it decides in, whatever the ledger knows of it."""
    return dataclasses.replace(found, info=dataclasses.replace(found.info, state=state), load=load, reported_at_s=now_s)
