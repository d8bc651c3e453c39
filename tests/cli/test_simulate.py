"""What ``starmesh simulate`` makes of its options, what it prints and keeps; the simulations are made by hand, but for
one."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from starmesh.cli.app import app
from starmesh.cli.run import CliError
from starmesh.cli.simulate_plan import SimulateOptions, make_plan, read_fault, read_slo, seconds
from starmesh.cli.simulate_run import replay, simulate
from starmesh.profiles import ProfileError, load_profile
from starmesh.sim.config import Fault, FaultKind, SimulationConfig, Slo
from starmesh.sim.predictors import PREDICTORS
from starmesh.sim.result import SimulationResult, config_to_json
from starmesh.sim.run import Progress
from starmesh.sim.saturation import estimate
from starmesh.sim.strategies import STRATEGIES
from starmesh.sim.workload import SimulatedRequest, draw_requests
from starmesh.types import Role
from tests.sim.runs import PROFILE, config_of, result_of

runner = CliRunner()
fast = pytest.mark.fast


def options(**changes: Any) -> SimulateOptions:
    return dataclasses.replace(SimulateOptions(compare="round_robin,star_plus", profile="h100-7b", decode=4), **changes)


def by_hand(config: SimulationConfig, *, progress: Callable[[Progress], None] | None = None) -> SimulationResult:
    """Stands for a simulation."""
    return result_of(config)


def never(config: SimulationConfig, *, progress: Callable[[Progress], None] | None = None) -> SimulationResult:
    raise AssertionError("it is kept")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"{second},{100 + second},{20 + second}" for second in range(50)]
    path.write_text("arrives_s,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    return path


def test_help_loads_nothing_that_takes_time() -> None:
    code = (
        "import sys\nfrom starmesh.cli.app import app\n"
        "try:\n    app(['simulate', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit(str(sorted({'grpc', 'torch', 'numpy'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.stderr == "\n"
    for word in ("--compare", "--trace", "--slo", *STRATEGIES, *PREDICTORS):
        assert word in done.stdout


@fast
def test_without_a_rate_some_below_saturation_are_tried() -> None:
    plan = make_plan(options())
    rates = list(dict.fromkeys(config.workload.rate for config in plan.configs))
    assert len(rates) == 3 and len(plan.configs) == 2 * 3 * 3
    assert all(rate is not None and 0.45 < rate / plan.saturation_rate < 1.0 for rate in rates)
    config = plan.configs[0]
    assert (config.strategy.name, config.profile.name, config.seed) == ("round_robin", "h100-7b", 0)
    assert config.workload.lengths == "reasoning"
    # The cluster fills during the longest request, and goes on for as long after the last measured one has come.
    ends_s = config.workload.requests / (config.workload.rate or 1.0)
    assert config.measure_until_s is not None
    assert config.warm_up_s == pytest.approx(ends_s / 3, rel=0.01)
    assert config.measure_until_s == pytest.approx(ends_s * 2 / 3, rel=0.01)
    longest_s = estimate(config.profile, list(draw_requests(config.workload, seed=0))).longest_s
    assert ends_s - config.measure_until_s == pytest.approx(longest_s, rel=0.05)
    # More time is spent on measuring, less is shared alike.
    long, short = (make_plan(options(rates="1", duration=text)).configs[0] for text in ("10h", "90s"))
    assert long.measure_until_s == pytest.approx(36_000 - longest_s, rel=0.05)
    assert (short.warm_up_s, short.measure_until_s) == pytest.approx((30.0, 60.0))
    assert plan.configs[0].workload == plan.configs[9].workload


@fast
def test_a_trace_is_replayed_as_it_is_and_whole(trace: Path) -> None:
    plan = make_plan(options(trace=trace))
    assert [config.strategy.name for config in plan.configs] == ["round_robin", "star_plus"]
    config = plan.configs[0]
    assert (config.workload.requests, config.workload.rate, config.warm_up_s) == (50, None, 0.0)
    assert (config.workload.arrivals, config.workload.lengths, config.measure_until_s) == ("trace", "trace", None)
    assert make_plan(options(trace=trace, duration="9.5s")).configs[0].workload.requests == 10
    faster = make_plan(options(trace=trace, rates="2,4", seeds=1)).configs
    assert [config.workload.rate for config in faster] == [2.0, 4.0] * 2
    assert {config.workload.requests for config in faster} == {50}
    own_arrivals = make_plan(options(trace=trace, arrivals="poisson", requests=30)).configs[0].workload
    assert (own_arrivals.arrivals, own_arrivals.lengths, own_arrivals.requests) == ("poisson", "trace", 30)


@fast
def test_options_reach_the_configuration() -> None:
    plan = make_plan(
        options(
            compare="star_plus, round_robin,star_plus",
            prefill=3,
            rates="0.5",
            requests=100,
            warm_up="10s",
            seeds=2,
            round_interval="500ms",
            kv_tokens=64_000,
            link_gb_per_s=1.0,
            recompute_speed=2.0,
            slos=["ttft=1s,tpot=20ms"],
            faults=["2m:die:decode-3", "10:join:decode-7", "11:die:decode-7"],
            predictor="oracle",
            variation=3.0,
            max_output_tokens=500,
            queue_length=64,
            queue_timeout="5m",
        )
    )
    assert len(plan.configs) == 4
    config = plan.configs[0]
    assert (config.prefill_instances, config.seed, config.warm_up_s, config.measure_until_s) == (3, 0, 10.0, None)
    assert (config.profile.kv_tokens, config.profile.link.bytes_per_s) == (64_000, 1e9)
    assert config.profile.cost.prefill_token_s == load_profile("h100-7b").cost.prefill_token_s / 2
    assert (config.round_interval_s, config.slos) == (0.5, (Slo(1.0, 0.02),))
    assert config.faults[0] == Fault(120.0, FaultKind.DIE, "decode-3")
    assert read_fault("1:join:prefill-7").role is Role.PREFILL
    assert (config.workload.arrivals, config.workload.variation) == ("gamma", 3.0)
    assert (config.workload.requests, config.workload.max_output_tokens) == (100, 500)
    assert (config.queue_length, config.queue_timeout_s) == (64, 300.0)
    assert config.strategy.predictor == "oracle"
    assert plan.configs[-1].strategy.predictor == "none", "round robin asks no predictor"
    in_gb = make_plan(options(kv_memory_gb=5.7344, rates="1", requests=9)).configs[0]
    assert in_gb.profile.kv_tokens == 100_000, "57,344 bytes each"


@fast
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"compare": "best"}, "--compare: 'best' is none of vllm_round_robin"),
        ({"compare": ","}, "--compare names at least one of"),
        ({"rates": "1,x"}, "--rates: '1,x' are no numbers above 0; write 1,2,4"),
        ({"rates": "0"}, "--rates"),
        ({"duration": "soon"}, "--duration: 'soon' is no duration; write 90s"),
        ({"slos": ["ttft=2s"], "rates": "1"}, "--slo: 'ttft=2s' does not name both; write ttft=2s,tpot=50ms"),
        ({"faults": ["9s:explode:decode-1"], "rates": "1"}, "--fault: .* write WHEN:die|join|drain:INSTANCE"),
        (
            {"faults": ["9s:die:decode-4"], "rates": "1"},
            "there is no decode-4 then; .* begins with decode-0 to decode-3",
        ),
        ({"predictor": "crystal ball"}, "is none of none, measured"),
        ({"kv_tokens": 1, "kv_memory_gb": 1.0}, "say the same; leave one out"),
        ({"requests": 9, "duration": "9s"}, "--requests and --duration both say how many; leave one out"),
        ({"round_interval": "0"}, "--round-interval: '0' is no time between rounds; write 100ms or more"),
        ({"lengths": "trace"}, "--lengths trace needs the file .*; name it with --trace"),
        ({"arrivals": "trace"}, "--arrivals trace needs the file .*; name it with --trace"),
        (
            {"compare": "star,perfect_balance", "faults": ["9s:die:decode-1"], "rates": "1"},
            "--fault: perfect_balance has no decode instances that could fail; leave it out of --compare",
        ),
    ],
)
def test_what_cannot_be_is_said_with_what_can(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CliError, match=why):
        make_plan(options(**changes))


@fast
def test_so_is_a_profile_or_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="use one of h100-32b"):
        make_plan(options(profile="h1000"))
    shown = runner.invoke(app, ["simulate", "--trace", str(tmp_path / "none.csv")])
    assert shown.exit_code == 1 and "none.csv" in shown.output
    shown = runner.invoke(app, ["simulate", "--json", str(tmp_path / "no" / "x.json")])
    assert shown.exit_code == 1 and "its directory does not exist" in shown.output


@fast
def test_texts_are_read() -> None:
    assert [seconds(text, "-") for text in ("90", "1.5m", "50ms", ".5h", "2 s")] == [90.0, 90.0, 0.05, 1800.0, 2.0]
    assert read_slo("tpot=50ms, ttft=2s") == Slo(2.0, 0.05)
    assert read_fault("0:drain:decode-0").kind is FaultKind.DRAIN


@fast
def test_saturation_is_where_full_batches_keep_up() -> None:
    requests = [SimulatedRequest("r", 0.0, 100, 200, 200)] * 3
    found = estimate(PROFILE, requests)
    # 16 sequences of 200 tokens at a time: memory, of 16,000 tokens, is no limit.
    assert found.sequences == 16
    assert found.step_s == pytest.approx(0.01 + 16 * 1e-4 + 16 * 200 * 1e-7)
    assert found.decode_rate == pytest.approx(16 / found.step_s / 200)
    assert found.rate(prefill_instances=1000, decode_instances=3) == pytest.approx(3 * found.decode_rate)
    assert found.rate(prefill_instances=1, decode_instances=10**6) == found.prefill_rate
    short = estimate(PROFILE.with_memory(1600), requests)
    assert short.sequences == 8
    instances = found.prefill_instances(math.inf, decode_instances=12)
    assert found.prefill_rate * instances >= 1.5 * found.decode_rate * 12 > found.prefill_rate * (instances - 1)
    assert found.prefill_instances(found.prefill_rate, decode_instances=10**6) == 2
    assert found.prefill_instances(0.01, decode_instances=12) == 1


@fast
def test_prefill_instances_are_as_many_as_the_load_needs(trace: Path) -> None:
    def prefill(**changes: Any) -> int:
        return make_plan(options(decode=64, **changes)).configs[0].prefill_instances

    # A request a second is nothing to one; what 64 decode instances carry is much.
    assert prefill(trace=trace) == prefill(trace=trace, rates="0.5,1") == 1
    most = prefill(trace=trace, arrivals="poisson", requests=50)
    assert most > 50 and prefill(trace=trace, rates="0.5,1e6") == most
    assert 1 < prefill(trace=trace, rates="1,1000") < most
    assert prefill(trace=trace, prefill=3) == 3


@fast
def test_a_trace_needs_prefill_for_its_busiest_minute(tmp_path: Path) -> None:
    path = tmp_path / "bursty.csv"
    rows = [f"{second},4000,20" for second in sorted([*range(0, 6000, 60), *[3000] * 6000])]
    path.write_text("arrives_s,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    assert make_plan(options(trace=path, decode=64)).configs[0].prefill_instances > 1


def test_a_run_prints_keeps_and_draws(tmp_path: Path) -> None:
    plan = make_plan(options(rates="1", requests=40, seeds=2))
    file = io.StringIO()
    simulate(plan, processes=1, out=tmp_path, console=Console(file=file, width=140), simulate_one=by_hand)
    shown = " ".join(file.getvalue().split())
    assert "4 decode and 1 prefill instance of h100-7b (937,648 tokens of KV memory each)" in shown
    for words in ("round_robin", "star_plus", "- In short: ", "4 runs on up to 1 process"):
        assert words in shown
    page = tmp_path / "report.html"
    assert f"page: {page}" in shown and page.read_text().startswith("<!doctype html>")
    assert len(list((tmp_path / "runs").glob("*.json"))) == 4
    simulate(plan, processes=1, out=tmp_path, console=Console(file=io.StringIO()), simulate_one=never)


def test_a_run_that_failed_says_how_to_run_it_alone(tmp_path: Path) -> None:
    plan = make_plan(options(rates="1", requests=40, seeds=1, compare="star_plus"))
    with pytest.raises(CliError, match=r"failed: AssertionError: it is kept; to run it alone: starmesh simulate --rep"):
        simulate(plan, processes=1, out=tmp_path, console=Console(file=io.StringIO()), simulate_one=never)


@fast
def test_a_result_is_run_again_and_compared(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    config = config_of("star")

    def replayed(run: Callable[[SimulationConfig], SimulationResult]) -> str:
        file = io.StringIO()
        replay(path, Console(file=file, width=120), run)
        return file.getvalue()

    path.write_text(config_to_json(config))
    assert result_of(config).trace_digest in replayed(result_of)
    path.write_text(result_of(config).to_json())
    assert "the same result as in the file" in replayed(result_of)
    assert "not the result that is in the file" in replayed(lambda config: result_of(config, slowness=2.0))
    for text in ("{}", '{"trace_digest": 1}', "no"):
        path.write_text(text)
        with pytest.raises(CliError, match="is no simulation: "):
            replayed(result_of)


def test_the_command_simulates(trace: Path, tmp_path: Path) -> None:
    json_file = tmp_path / "results.json"
    arguments = ["simulate", "--trace", str(trace), "--decode", "2", "--processes", "1", "--json", str(json_file)]
    shown = runner.invoke(app, [*arguments, "--compare", "round_robin,current_load"])
    assert shown.exit_code == 0, shown.output
    assert "In short: one seed says nothing of chance; --seeds 5 does, of step times" in " ".join(shown.output.split())
    first, second = json.loads(json_file.read_text())
    assert first["requests"]["finished"] == second["requests"]["finished"] == 50
