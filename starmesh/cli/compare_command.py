"""``starmesh compare`` as a command: its options and help.

What it does is in ``compare``, imported only when it runs: ``--help`` loads neither gRPC nor a model.
"""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from starmesh.cli import emulating as emulation
from starmesh.cli import local_options, options
from starmesh.cli.emulating import Emulating
from starmesh.cli.local_options import (
    DEFAULT_MODEL,
    DispatchPolicy,
    Predicting,
    ReschedulingPolicy,
    flags,
    model_directory,
    run_directory,
)
from starmesh.cli.run import CliError, fail, run

_POLICIES = get_args(ReschedulingPolicy)


def compare(
    *,
    policies: Annotated[
        list[str] | None,
        typer.Argument(metavar="POLICY...", help=f"Of {', '.join(_POLICIES)}. (default: none and star_plus)"),
    ] = None,
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help='JSON Lines of {"prompt": ...}. (default: a skewed load)')
    ] = "",
    decode: local_options.Decode = 3,
    prefill: local_options.Prefill = 1,
    dispatch: Annotated[DispatchPolicy, typer.Option(help="How decode instances are chosen.")] = "round_robin",
    requests: Annotated[int, typer.Option(min=1, help="How many.")] = 24,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests per second, as a Poisson process.")] = 2.0,
    long_tokens: Annotated[int, typer.Option(min=2, help="Output tokens of each long request.")] = 400,
    short_tokens: Annotated[int, typer.Option(min=2, help="Output tokens of the others.")] = 40,
    slo_ttft: Annotated[float, typer.Option(min=0, help="Seconds that TTFT may take for goodput.")] = 4.0,
    slo_tpot: Annotated[float, typer.Option(min=0, help="Seconds that TPOT may take for goodput.")] = 0.5,
    kv_memory_mib: local_options.KvMemoryMib = 512,
    round_interval: Annotated[float, typer.Option(min=0.05, help="Seconds between rescheduling rounds.")] = 1.0,
    predictor: local_options.Predictor = "",
    json_file: options.JsonFile = None,
    model: local_options.Model = DEFAULT_MODEL,
    device: local_options.Device = "cpu",
    engine: emulation.Engine = "torch",
    profile: emulation.ProfileName = "",
    speed: emulation.Speed = 1.0,
    kv_tokens: emulation.KvTokens = 0,
) -> None:
    """Put the same load on a local cluster under one rescheduling policy after another.

    The default load has a long request for each so many short ones as there are decode instances, so that round robin
    puts all long ones on the same instance.
    """
    from rich.console import Console

    from starmesh.cli.bench import Load, read_prompts
    from starmesh.cli.compare import compare as run_all
    from starmesh.cli.compare import write_json
    from starmesh.cli.compare_report import comparison, run_json
    from starmesh.cli.local_cluster import ClusterPlan
    from starmesh.cli.options import Asking
    from starmesh.cli.predictor_choice import choose_predictor
    from starmesh.cli.skewed_load import SkewedLoad

    emulating = Emulating(engine=engine, profile=profile, speed=speed, kv_tokens=kv_tokens)
    predicting = Predicting(predictor=predictor)
    predicting.check(dispatch)
    emulating.check(predicting)
    for policy in policies or ():
        if policy not in _POLICIES:
            raise typer.BadParameter(f"{policy!r} is none of {', '.join(_POLICIES)}", param_hint="POLICY")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        fail(f"cannot write {json_file}: its directory does not exist")
    try:
        lines = read_prompts(prompts) if prompts else []
    except CliError as error:
        fail(str(error))
    skewed = SkewedLoad(count=requests, period=decode, long_tokens=long_tokens, short_tokens=short_tokens)
    directory = None if emulating.on else model_directory(model)
    try:
        choice = choose_predictor(predicting, directory)
    except CliError as error:
        fail(str(error))
    plan = ClusterPlan(
        model=directory,
        run_directory=run_directory(None),
        prefill=prefill,
        decode=decode,
        engine_flags=(*flags({"--device": device, "--kv-memory-mib": kv_memory_mib}), *choice.engine_flags),
        router_flags=flags({"--dispatch-policy": dispatch}),
        rescheduler_flags=flags({"--round-interval-s": emulating.interval_s(round_interval)}),
        predict=predicting.on,
        predictor_flags=predicting.flags,
    )
    console = Console()
    runs = run(
        run_all(
            emulating.apply(plan),
            policies or ["none", "star_plus"],
            (lines, Asking()) if lines else skewed,
            Load(requests=requests, rate=rate),
            slo_ttft_s=slo_ttft,
            slo_tpot_s=slo_tpot,
            say=lambda line: console.print(line, highlight=False),
        )
    )
    console.print(comparison(runs))
    if json_file is not None:
        try:
            write_json(json_file, [run_json(each) for each in runs])
        except CliError as error:
            fail(str(error))
