"""Rescheduling by example: each policy's choice worked out by hand, each reason, each fallback; and STAR's move against
the best of all moves, found by trying them."""

from __future__ import annotations

import dataclasses
from statistics import pvariance

import pytest
from hypothesis import given

from starmesh.policy.cost import CostModel
from starmesh.policy.rescheduling import (
    POLICIES,
    InstanceSkip,
    Plan,
    PlanMemory,
    ReschedulingConfig,
    SequenceSkip,
    SkippedInstance,
    plan,
)
from starmesh.types import ClusterView, InstanceState, InstanceView, MigrationReason, SequenceLoad

from .decoding import CHEAP, CONFIG, decode, plain_clusters, sequence
from .views import NOW_S, OTHER_LAYOUT, cluster, prefill

pytestmark = pytest.mark.fast

EMPTY = PlanMemory()


def decide(policy: str, *instances: InstanceView, memory: PlanMemory = EMPTY, **fields: object) -> Plan:
    config = dataclasses.replace(CONFIG, policy=policy, **fields)  # type: ignore[arg-type]
    return plan(cluster(*instances), memory, config)


def moves(decided: Plan) -> list[tuple[str, str, str]]:
    return [(move.request_id, move.source, move.target) for move in decided.migrations]


def reasons(decided: Plan) -> dict[str, SequenceSkip]:
    return {name: skip.reason for skip in decided.skipped for name in skip.request_ids}


def test_registry() -> None:
    assert sorted(POLICIES) == ["current_load", "llumnix", "none", "star", "star_plus"]
    assert all(name == policy.name for name, policy in POLICIES.items())
    with pytest.raises(ValueError, match="current_load, llumnix, none, star, star_plus"):
        decide("best")


def test_none_moves_nothing() -> None:
    assert moves(decide("none", decode("d0", sequence("a", 500), sequence("b", 500)), decode("d1"))) == []


def test_current_load_moves_half_the_gap() -> None:
    # 600 against 100, the gap is 500. Of 100, 200 and 300 moving 200 or 300 leaves 400 and 300: the lower id goes.
    busy = decode("d0", sequence("a", 100), sequence("c", 200), sequence("b", 300))
    decided = decide("current_load", busy, decode("d1", sequence("d", 100)))
    assert moves(decided) == [("b", "d0", "d1")]
    assert decided.migrations[0].reason is MigrationReason.LOAD
    assert (decided.spread_before_tokens, decided.spread_after_tokens) == (250, 50)
    assert decided.migrations[0].gain_tokens == pytest.approx(200)
    # After that nothing more would help: the gap is 100.
    assert reasons(decided) == {"a": SequenceSkip.NO_GAIN, "c": SequenceSkip.NO_GAIN}


def test_star_looks_ahead_where_current_load_does_not() -> None:
    # Now 300 against 300. But a ends after 4 steps, while b and c run through the horizon of 40.
    ending = decode("d0", sequence("a", 300, 4))
    lasting = decode("d1", sequence("b", 150, 900), sequence("c", 150, 900))
    assert moves(decide("current_load", ending, lasting)) == []
    decided = decide("star", ending, lasting)
    assert moves(decided) == [("b", "d1", "d0")]
    assert decided.migrations[0].reason is MigrationReason.PREDICTED_LOAD
    # W: a holds 300..304 for 5 of 41 steps; b and c 150..190 for all.
    before = (2 * 170 - 5 * 302 / 41) / 2
    assert decided.spread_before_tokens == pytest.approx(before)
    assert decided.spread_after_tokens == pytest.approx(5 * 302 / 41 / 2)


@pytest.mark.parametrize("doubtful", [{"remaining": None}, {"remaining": 4, "age": 1000}, {"remaining": 0, "age": 9}])
def test_without_a_believable_prediction_the_current_load_counts(doubtful: dict[str, int]) -> None:
    ending = decode("d0", sequence("a", 300, **doubtful))
    lasting = decode("d1", sequence("b", 150), sequence("c", 150))
    for policy in ("star", "star_plus"):
        decided = decide(policy, ending, lasting)
        assert moves(decided) == []
        assert decided.spread_before_tokens == 0


@pytest.mark.parametrize("doubtful", [{"remaining": None}, {"remaining": 900, "age": 1000}])
def test_what_reaches_its_limit_shortly_is_not_moved(doubtful: dict[str, int]) -> None:
    # 600 against 200: half of the gap is a's 200. But a generates 4 more at most, and then there are 400 against 200.
    def decided(most: int) -> Plan:
        ending = sequence("a", 200, max_output_tokens=1 + most, **doubtful)
        return decide(
            "star_plus", decode("d0", ending, sequence("b", 400)), decode("d1", sequence("c", 200)), hysteresis=4
        )

    assert moves(decided(1000)) == [("a", "d0", "d1")]
    assert moves(decided(41)) == [("a", "d0", "d1")], "beyond the horizon"
    assert moves(decided(4)) == []
    assert reasons(decided(4))["a"] is SequenceSkip.NO_GAIN


def best_by_trial(view: ClusterView, config: ReschedulingConfig) -> set[tuple[str, str, str]]:
    """The moves from an overloaded to an underloaded instance that leave the least variance, counted step by step."""
    steps = range(config.horizon_steps + 1)

    def held(known: SequenceLoad, step: int) -> int:
        tokens, limit = known.prompt_tokens + known.output_tokens, known.max_output_tokens - known.output_tokens
        if not known.remaining_tokens or (known.prediction_age_tokens or 0) > config.max_prediction_age_tokens:
            return tokens
        return tokens + step if step <= min(known.remaining_tokens, limit) else 0

    def most(known: SequenceLoad, step: int) -> int:
        tokens, limit = known.prompt_tokens + known.output_tokens, known.max_output_tokens - known.output_tokens
        if known.remaining_tokens and (known.prediction_age_tokens or 0) <= config.max_prediction_age_tokens:
            assert known.remaining_tokens_upper is not None
            if known.remaining_tokens_upper > 0:
                limit = min(limit, max(known.remaining_tokens_upper, known.remaining_tokens))
        return -(-(tokens + step) // 16) if step <= limit else 0

    here = {found.info.instance_id: found.load for found in view.instances}
    assert all(here.values())
    weight = {s.request_id: sum(held(s, t) for t in steps) for load in here.values() if load for s in load.sequences}
    loads = {name: sum(weight[s.request_id] for s in load.sequences) for name, load in here.items() if load}
    mean = sum(loads.values()) / max(1, len(loads))
    found: dict[tuple[str, str, str], float] = {}
    for source, load in here.items():
        for target, other in here.items():
            assert load is not None and other is not None
            for known in load.sequences if loads[source] > mean > loads[target] else ():
                room = all(sum(most(s, t) for s in (*other.sequences, known)) <= other.total_blocks for t in steps)
                if known.resident_tokens > 0 and room:
                    size = weight[known.request_id]
                    after = loads | {source: loads[source] - size, target: loads[target] + size}
                    found[known.request_id, source, target] = pvariance(list(after.values()))
    least = min(found.values(), default=float("inf"))
    if len(loads) < 2 or least >= pvariance(list(loads.values())) * (1 - 1e-12):
        return set()
    return {move for move, variance in found.items() if variance <= least * (1 + 1e-12)}


@given(plain_clusters)
def test_star_makes_the_best_of_all_moves(view: ClusterView) -> None:
    config = dataclasses.replace(CONFIG, memory_bins=CONFIG.horizon_steps + 1)
    best = best_by_trial(view, config)
    made = moves(plan(view, EMPTY, config))
    assert len(made) == min(1, len(best))
    assert set(made) <= best


def test_star_plus_moves_until_nothing_helps() -> None:
    six = [sequence(f"s{number}", 100, 900) for number in range(6)]
    decided = decide("star_plus", decode("d0", *six), decode("d1"), decode("d2"))
    assert moves(decided) == [("s0", "d0", "d1"), ("s1", "d0", "d2"), ("s2", "d0", "d1"), ("s3", "d0", "d2")]
    assert decided.spread_after_tokens == pytest.approx(0)
    assert moves(decide("star_plus", decode("d0", *six), decode("d1"), max_in_flight_per_source=2)) == [
        ("s0", "d0", "d1"),
        ("s1", "d0", "d1"),
    ]


def test_star_plus_sees_when_loads_meet() -> None:
    # Over the horizon both instances hold the same on average. But all of the one end together, and at first they are
    # twice as much as the others.
    now = decode("d0", *(sequence(f"a{number}", 200, 20, max_output_tokens=21) for number in range(4)))
    later = decode("d1", sequence("c", 195, 900), sequence("d", 195, 900))
    assert decide("star", now, later).spread_before_tokens < 10
    assert moves(decide("star", now, later)) == []
    decided = decide("star_plus", now, later, sample_count=41)
    assert moves(decided) == [("a0", "d0", "d1")]
    assert decided.spread_after_tokens < decided.spread_before_tokens


def test_two_instances_never_exchange_sequences() -> None:
    # 160 against 110: moving 70 or 90 turns the imbalance round. 90 for 65 would level it, and may not be.
    heavy = decode("d0", sequence("a", 90), sequence("b", 70))
    light = decode("d1", sequence("c", 65), sequence("d", 45))
    for policy in ("star", "star_plus"):
        decided = decide(policy, heavy, light)
        assert moves(decided) == []
        assert reasons(decided) == dict.fromkeys("ab", SequenceSkip.NO_GAIN)


def test_star_plus_moves_only_what_is_worth_it() -> None:
    busy, idle = decode("d0", sequence("a", 100, 900), sequence("b", 100, 900)), decode("d1")
    slow = dataclasses.replace(CHEAP, transfer_setup_s=10.0)
    assert moves(decide("star_plus", busy, idle)) == [("a", "d0", "d1")]
    # Saved over 41 steps: 120 tokens less on d0 for the other sequence, and the same for the moved one, 1e-5 s each:
    # about 0.1 s. A step of 0.02 s and 10 s of 1 % for two sequences, on the other hand, come to 0.22 s.
    decided = decide("star_plus", busy, idle, cost=slow, hysteresis=1.0)
    assert moves(decided) == []
    assert set(reasons(decided).values()) == {SequenceSkip.NO_GAIN}
    assert moves(decide("star_plus", busy, idle, cost=slow, hysteresis=0.1)) == [("a", "d0", "d1")]
    # Migrations have taken a tenth of the estimate lately.
    quick = PlanMemory(transfer_factor=0.1)
    assert moves(decide("star_plus", busy, idle, cost=slow, hysteresis=1.0, memory=quick)) == [("a", "d0", "d1")]


def test_amortisation_by_median_or_by_limit() -> None:
    # A transfer takes 1 s, a step 0.02 s plus 1e-5 s a token: 0.0225 s. Twice the transfer is 89 steps.
    cost = CostModel(
        step_base_s=0.02, step_sequence_s=0.0, step_token_s=1e-5, transfer_setup_s=1.0, transfer_bytes_per_s=1e15
    )
    busy = decode(
        "d0",
        sequence("a", 50, 88),
        sequence("b", 50, 89),
        sequence("c", 50, max_output_tokens=89),
        sequence("d", 50, max_output_tokens=90),
        sequence("e", 54, 200, max_output_tokens=80),
    )
    decided = decide("star", busy, decode("d1"), cost=cost, amortisation=2.0)
    stays = reasons(decided)
    assert {name for name, reason in stays.items() if reason is SequenceSkip.NOT_AMORTISED} == {"a", "c", "e"}
    assert moves(decided) in ([("b", "d0", "d1")], [("d", "d0", "d1")])


def test_llumnix_pairs_the_least_free_with_the_freest() -> None:
    # 10 blocks are 160 tokens. Freeness: d0 (160 - 150) / 3, d1 (160 - 140) / 2, d2 160, d3 (160 - 20) / 1.
    instances = (
        decode("d0", sequence("a", 70), sequence("b", 40), sequence("c", 40), total_blocks=10),
        decode("d1", sequence("d", 100), sequence("e", 40), total_blocks=10),
        decode("d2", total_blocks=10),
        decode("d3", sequence("f", 20), total_blocks=10),
    )
    decided = decide("llumnix", *instances)
    # The shortest of d0 to d2: 50 / 2 = 25 against 120. The shortest of d1 to d3: 60 against (160 - 60) / 2 = 50 would
    # turn the gap round.
    assert moves(decided) == [("b", "d0", "d2")]
    assert decided.migrations[0].gain_tokens == pytest.approx((160 - 10 / 3) - (120 - 25))
    assert reasons(decided) == dict.fromkeys("ac", SequenceSkip.BUDGET) | dict.fromkeys("de", SequenceSkip.NO_GAIN)
    assert moves(decide("llumnix", *instances, freeness_threshold_blocks=0.0)) == []


def test_memory_pressure_comes_before_balance() -> None:
    # d0 will hold 4 x 120 tokens at the end of the horizon and has 28 blocks, 448 tokens; d1 holds as many tokens.
    full = decode("d0", *(sequence(f"s{number}", 80, 900) for number in range(4)), total_blocks=28)
    roomy = decode("d1", *(sequence(f"t{number}", 80, 900) for number in range(4)))
    assert moves(decide("star", full, roomy)) == []
    decided = decide("star_plus", full, roomy)
    assert moves(decided) == [("s0", "d0", "d1")]
    assert decided.migrations[0].reason is MigrationReason.MEMORY
    # 4 x 8 blocks are needed, 4 more than there are.
    assert decided.migrations[0].gain_tokens == 64


def test_drains_come_first_and_do_not_wait() -> None:
    # For each token to copy b may last 3 steps, and a 2.
    leaving = decode(
        "d0",
        sequence("a", 30, max_output_tokens=61),
        sequence("b", 300, max_output_tokens=901),
        state=InstanceState.DRAINING,
    )
    quiet, busy = decode("d1", sequence("c", 100)), decode("d2", sequence("d", 400))
    for policy in ("current_load", "llumnix", "star", "star_plus"):
        decided = decide(policy, leaving, quiet, busy)
        assert moves(decided)[:2] == [("b", "d0", "d1"), ("a", "d0", "d1")]
        assert [move.reason for move in decided.migrations[:2]] == [MigrationReason.DRAIN] * 2
    assert moves(decide("none", leaving, quiet, busy)) == []
    alone = decide("star", leaving)
    assert alone.skipped_instances == (SkippedInstance("d0", InstanceSkip.ALONE),)


@pytest.mark.parametrize(
    ("unusable", "reason"),
    [
        (decode("d1", reported_at_s=None), InstanceSkip.NO_REPORT),
        (decode("d1", reported_at_s=NOW_S - 6), InstanceSkip.STALE),
        (decode("d1", layout=None), InstanceSkip.NO_LAYOUT),
        (decode("d1", state=InstanceState.DRAINED), InstanceSkip.DRAINED),
        (decode("d1", layout=OTHER_LAYOUT), InstanceSkip.ALONE),
    ],
)
def test_instances_that_do_not_count(unusable: InstanceView, reason: InstanceSkip) -> None:
    busy = decode("d0", sequence("a", 300), sequence("b", 300))
    for policy in POLICIES:
        decided = decide(policy, busy, unusable)
        assert moves(decided) == []
        assert SkippedInstance("d1", reason) in decided.skipped_instances
        decided = decide(policy, busy, unusable, decode("d2"))
        assert {target for _, _, target in moves(decided)} <= {"d2"}


def test_clusters_without_a_choice() -> None:
    for policy in POLICIES:
        for instances in ((), (prefill(),), (decode("d0", sequence("a", 100)),), (decode("d0"), decode("d1"))):
            assert decide(policy, *instances).migrations == ()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (decode("d1", waiting=1), SequenceSkip.NO_TARGET),
        (decode("d1", sequence("z", 10), max_sequences=1), SequenceSkip.NO_TARGET),
        (decode("d1", state=InstanceState.DRAINING), None),
        (decode("d1", total_blocks=10), SequenceSkip.NO_ROOM),
        (decode("d1", reserved=(1400,)), None),
    ],
)
def test_targets_that_cannot_take_it(target: InstanceView, reason: SequenceSkip | None) -> None:
    decided = decide("star", decode("d0", sequence("a", 300), sequence("b", 300)), target)
    assert moves(decided) == []
    assert set(reasons(decided).values()) == ({reason} if reason else set())


def test_memory_bound_without_prediction_is_the_limit() -> None:
    # 15 blocks are 240 tokens. The sequence may grow by the horizon of 40, or is predicted to end after 5.
    for policy in ("star", "star_plus"):
        for known, fits in (
            (sequence("a", 220), False),
            (sequence("a", 220, max_output_tokens=5), True),
            (sequence("a", 220, 5, 15), True),
            (sequence("a", 220, 5, 30), False),
        ):
            decided = decide(policy, decode("d0", known, sequence("b", 220, 5, 5)), decode("d1", total_blocks=15))
            assert (
                "a" in {name for name, _, _ in moves(decided)} or reasons(decided)["a"] is SequenceSkip.BUDGET
            ) == fits


def test_sequences_that_cannot_move() -> None:
    busy = decode(
        "d0",
        sequence("waiting", 300, resident_tokens=0),
        sequence("prompting", 300, resident_tokens=200),
        sequence("fresh", 301, output_tokens=0, resident_tokens=300),
        sequence("fine", 100),
    )
    decided = decide("star", busy, decode("d1"))
    assert moves(decided) == [("fine", "d0", "d1")]
    assert reasons(decided) == dict.fromkeys(("waiting", "prompting", "fresh"), SequenceSkip.NOT_DECODING)


def test_a_move_does_not_shorten_an_answer() -> None:
    # d1 ends sequences at 500 tokens; this one may become 100 + 999 long.
    short = dataclasses.replace(decode("d1"), info=dataclasses.replace(decode("d1").info, max_sequence_tokens=500))
    decided = decide("star", decode("d0", sequence("a", 100), sequence("b", 90, max_output_tokens=300)), short)
    assert moves(decided) == [("b", "d0", "d1")]
    assert moves(decide("star", decode("d0", sequence("a", 100), sequence("b", 90)), decode("d1"))) == [
        ("a", "d0", "d1")
    ]
    neither = decide("star", decode("d0", sequence("a", 100), sequence("b", 90)), short)
    assert reasons(neither) == dict.fromkeys("ab", SequenceSkip.NO_ROOM)


@pytest.mark.parametrize("wrong", [{"watermark": 1.0}, {"cool_down_s": -1.0}, {"shortlist": 0}, {"horizon_steps": -1}])
def test_config_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least"):
        dataclasses.replace(CONFIG, **wrong)  # type: ignore[arg-type]
