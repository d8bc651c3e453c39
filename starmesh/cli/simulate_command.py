"""``starmesh simulate``: its options and help. What it does is in ``simulate_plan`` and ``simulate_run``, imported only
when it runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from starmesh.cli.run import CliError, fail

_SETUP, _LOAD, _RUNS = "The cluster", "The load", "The runs"


def simulate(
    *,
    compare: Annotated[
        str, typer.Option(metavar="NAME,...", help="Strategies, side by side; see above.")
    ] = "round_robin,least_tokens,star_plus",
    profile: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE", help="What an instance is: a profile's name, or its file.", rich_help_panel=_SETUP
        ),
    ] = "h100-7b",
    decode: Annotated[int, typer.Option(min=1, help="Decode instances.", rich_help_panel=_SETUP)] = 4,
    prefill: Annotated[
        int | None,
        typer.Option(min=1, help="Prefill instances. (default: as many as do not hold up)", rich_help_panel=_SETUP),
    ] = None,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="KV memory of an instance, in tokens.", rich_help_panel=_SETUP)
    ] = None,
    kv_memory_gb: Annotated[
        float | None, typer.Option(min=0.001, help="The same in GB.", rich_help_panel=_SETUP)
    ] = None,
    link_gb_per_s: Annotated[
        float | None, typer.Option(min=0.0001, help="Bandwidth of an instance, each way.", rich_help_panel=_SETUP)
    ] = None,
    recompute_speed: Annotated[
        float,
        typer.Option(min=0.001, help="Compute prompts so many times as fast.", rich_help_panel=_SETUP),
    ] = 1.0,
    round_interval: Annotated[
        str, typer.Option(metavar="TIME", help="Between rounds of rescheduling.", rich_help_panel=_SETUP)
    ] = "1s",
    queue_length: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that may wait for room. (default: as many as live)", rich_help_panel=_SETUP),
    ] = None,
    queue_timeout: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="How long one waits for room, at most. (default: as long as live)",
            rich_help_panel=_SETUP,
        ),
    ] = "",
    predictor: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="For strategies that predict: measured, paper, oracle or none. (default: their own)",
            rich_help_panel=_SETUP,
        ),
    ] = "",
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHEN:WHAT:INSTANCE",
            help="An instance dies, drains or joins, such as 120s:die:decode-3; may be repeated.",
            rich_help_panel=_SETUP,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Replay recorded requests: Azure 2023 or 2024, BurstGPT, Mooncake, or JSON Lines or CSV of "
            "arrives_s, prompt_tokens, output_tokens; also .gz.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    rates: Annotated[
        str,
        typer.Option(
            metavar="N,...",
            help="Requests per second to try. (default: a trace as it is, else some below saturation)",
            rich_help_panel=_LOAD,
        ),
    ] = "",
    lengths: Annotated[
        Literal["reasoning", "chat", "trace"] | None,
        typer.Option(help="Of prompts and outputs. (default: the trace's, else reasoning)", rich_help_panel=_LOAD),
    ] = None,
    arrivals: Annotated[
        Literal["poisson", "gamma", "trace"] | None,
        typer.Option(help="(default: the trace's, else poisson)", rich_help_panel=_LOAD),
    ] = None,
    variation: Annotated[
        float,
        typer.Option(min=0.01, help="Of the gaps of gamma arrivals; above 1 is bursty.", rich_help_panel=_LOAD),
    ] = 1.0,
    max_output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Limit of each output.", rich_help_panel=_LOAD)
    ] = None,
    output_scale: Annotated[
        float, typer.Option(min=0.0001, help="Multiply output lengths by this.", rich_help_panel=_LOAD)
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="How many, instead of --duration. (default: a trace's)", rich_help_panel=_LOAD),
    ] = None,
    duration: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="Virtual time in which they arrive. (default: 3 longest ones)", rich_help_panel=_LOAD
        ),
    ] = "",
    warm_up: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Requests before it are not measured. (default: none of a whole trace or one as it is, else a third "
            "of the time; nor are then the last, for as long as the longest takes)",
            rich_help_panel=_LOAD,
        ),
    ] = "",
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ttft=TIME,tpot=TIME",
            help="What a request must keep to count for goodput; may be repeated. (default: 2s and 50ms, 5s and 100ms)",
            rich_help_panel=_RUNS,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs of each, for intervals. (default: 3, 1 of a trace as it is)", rich_help_panel=_RUNS
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. (default: one for each CPU)", rich_help_panel=_RUNS)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep each result there, so that the same command goes on where it was, and write a page with plots.",
            rich_help_panel=_RUNS,
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all results to a file as JSON.", rich_help_panel=_RUNS),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Run one configuration or result again, alone.", rich_help_panel=_RUNS),
    ] = None,
) -> None:
    """See what a cluster would do with a load before there is one: the live policies on virtual time.

    Place a request once: round_robin, least_requests, least_tokens, power_of_two. The same without regard to memory, as
    vLLM's P/D set-ups do: vllm_round_robin, vllm_least_tokens.

    Move running ones too: llumnix, current_load, star, star_plus.

    The same without predictions: star_unpredicted, star_plus_unpredicted.

    With perfect ones: star_oracle, star_plus_oracle.

    star_plus where requests go by the predicted peak of memory: star_peak, star_peak_oracle; held_peak lets them wait.

    What balance alone can reach where memory suffices: perfect_balance.

    On your own load: starmesh simulate --trace FILE --profile h100-7b --decode 8
    """
    from rich.console import Console

    from starmesh.cli.simulate_plan import SimulateOptions, make_plan
    from starmesh.cli.simulate_run import replay as run_again
    from starmesh.cli.simulate_run import simulate as run_plan
    from starmesh.cli.simulate_run import write_json
    from starmesh.profiles import ProfileError
    from starmesh.sim.workload import WorkloadError

    console = Console()
    options = SimulateOptions(
        compare=compare,
        profile=profile,
        decode=decode,
        prefill=prefill,
        trace=trace,
        lengths=lengths,
        arrivals=arrivals,
        variation=variation,
        max_output_tokens=max_output_tokens,
        output_scale=output_scale,
        rates=rates,
        requests=requests,
        duration=duration,
        warm_up=warm_up,
        seeds=seeds,
        round_interval=round_interval,
        kv_tokens=kv_tokens,
        kv_memory_gb=kv_memory_gb,
        link_gb_per_s=link_gb_per_s,
        recompute_speed=recompute_speed,
        slos=slo or (),
        faults=fault or (),
        predictor=predictor,
        queue_length=queue_length,
        queue_timeout=queue_timeout,
    )
    try:
        if replay is not None:
            from starmesh.sim.run import run_simulation

            run_again(replay, console, run_simulation)
            return
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise CliError(f"cannot write {json_file}: its directory does not exist")
        plan = make_plan(options)
        summary = run_plan(plan, processes=processes or os.cpu_count() or 1, out=out, console=console)
        if json_file is not None:
            write_json(json_file, summary)
    except (CliError, ProfileError, WorkloadError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
