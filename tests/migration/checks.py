"""What must hold after every action, and in the end."""

from __future__ import annotations

from itertools import pairwise

from tests.migration.engine_model import TOTAL_BLOCKS
from tests.migration.instance_model import Instance
from tests.migration.router_model import ROUTER_STEP
from tests.migration.world import World

MAX_TURNS = 20_000


def check(world: World) -> None:
    for life in world.lives.values():
        used = [block for sequence in life.sequences.values() for block in sequence.block_ids]
        used += [block for _, block_ids in life.incoming.values() for block in block_ids]
        assert sorted(used + life.free) == list(range(TOTAL_BLOCKS)), f"blocks of {life.id}"
        if not life.engine_calls and not life.answers:
            check_settled(life)
    for request_id in world.requests:
        # A sequence that no worker knows is about to be removed from its engine (check_settled); nobody hears of it.
        epochs = sorted(
            (life.sequences[request_id].epoch, life.id)
            for life in world.lives.values()
            if request_id in life.sequences
            and life.sequences[request_id].status != "held"
            and request_id in life.running
        )
        for epoch, instance_id in epochs:
            entry = world.entries.get(request_id)
            if entry is not None and not world.ledger_lost and not world.lives[instance_id].engine_calls:
                # Whoever decodes knows of every claim of a migration: either it made it, or it had let go before.
                assert not epoch < entry.epoch < epoch + ROUTER_STEP, f"{instance_id} ({epoch}) against {entry}"
        for (first, a), (second, b) in pairwise(epochs):
            # A router that asks a ledger without entries knows only of the epochs that it has heard of.
            apart = 1 if world.ledger_lost else ROUTER_STEP
            assert second - first >= apart, f"{request_id} is decoded at {a} ({first}) and {b} ({second})"


def check_settled(life: Instance) -> None:
    """No block is kept for nobody."""
    moving_in = {taking.end.terms.request_id for taking in life.targets.values()}
    assert life.incoming.keys() <= moving_in, f"{life.id} keeps blocks of {life.incoming.keys() - moving_in}"
    for request_id, sequence in life.sequences.items():
        if sequence.status == "held":
            assert request_id in life.sources, f"{life.id} holds {request_id} for nobody"
        assert request_id in life.running, f"{life.id} decodes {request_id} for nobody"
    keys = {moving.end.terms.reservation_id for moving in life.sources.values()}
    assert {owner_key for owner_key, _ in life.leases.values()} <= keys, f"leases of {life.id}"


def heal(world: World) -> None:
    """End the faults and let everything run out: calls that got lost fail when there is nothing else to do, and timers
    fire only after that."""
    for turn in range(MAX_TURNS):
        actions = world.work() + world.steps() or world.lost_calls() or world.timers()
        if not actions:
            break
        actions[turn % len(actions)][1]()
        check(world)
    else:
        raise AssertionError("it never comes to rest")
    check_over(world)


def check_over(world: World) -> None:
    """Every request has ended and brought all its tokens, and nothing of any is left anywhere."""
    for request in world.requests.values():
        assert request.ended, f"{request.id} hangs"
        if not request.cancelled:
            assert request.stream.token_ids == list(range(request.stream.max_output_tokens))
    for life in world.lives.values():
        assert not life.sources and not life.targets and not life.running, f"{life.id} has not finished"
        assert len(life.free) == TOTAL_BLOCKS and not life.leases and not life.parked, f"{life.id} leaks"
