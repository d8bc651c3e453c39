"""Commands of this machine: ``up``, ``demo``, ``compare`` and ``model fetch``, their options and help.

What they do is in the modules beside this one, imported only when they run: ``--help`` loads neither gRPC nor a model.
"""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from starmesh.cli import emulating as emulation
from starmesh.cli import local_options, options
from starmesh.cli.emulating import Emulating
from starmesh.cli.local_options import (
    DEFAULT_MODEL,
    EVERY_TOKENS,
    NO_PREDICTOR,
    Predicting,
    flags,
    model_directory,
    run_directory,
)
from starmesh.cli.run import CliError, fail, run

DispatchPolicy = Literal[
    "round_robin", "least_requests", "least_tokens", "power_of_two", "predicted_load", "predicted_peak"
]
ReschedulingPolicy = Literal["none", "current_load", "llumnix", "star", "star_plus"]
_POLICIES = get_args(ReschedulingPolicy)
Transfer = Literal["nixl,stream", "stream,nixl", "nixl", "stream"]


def up(
    *,
    prefill: local_options.Prefill = 1,
    decode: local_options.Decode = 2,
    model: local_options.Model = DEFAULT_MODEL,
    device: local_options.Device = "cpu",
    dtype: local_options.Dtype = "float32",
    engine: emulation.Engine = "torch",
    profile: emulation.ProfileName = "",
    speed: emulation.Speed = 1.0,
    kv_tokens: emulation.KvTokens = 0,
    output_lengths: emulation.OutputLengths = "chat",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the router; 0 takes a free one.")] = 50051,
    ledger: Annotated[
        str, typer.Option(envvar="STARMESH_LEDGER", metavar="URL", help="Redis to use. (default: one of its own)")
    ] = "",
    cluster: Annotated[str, typer.Option(help="Name of the cluster; several may share a Redis.")] = "default",
    dispatch: Annotated[DispatchPolicy, typer.Option(help="How decode instances are chosen.")] = "least_tokens",
    policy: Annotated[ReschedulingPolicy, typer.Option(help="How running requests are rebalanced.")] = "star_plus",
    predictor: local_options.Predictor = "",
    predictor_dir: local_options.PredictorDir = None,
    predictor_metrics: local_options.PredictorMetrics = "",
    collect: local_options.CollectDir = None,
    collect_max_mib: local_options.CollectMaxMib = 1024,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append each round of rescheduling, to plan it again.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for an instance with room.")] = 1024,
    kv_memory_mib: local_options.KvMemoryMib = 512,
    block_tokens: Annotated[int, typer.Option(min=1, max=256, help="Tokens of a KV block.")] = 16,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 64,
    max_step_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed in a step.")] = 512,
    threads: local_options.Threads = 1,
    transfer: Annotated[Transfer, typer.Option(help="KV transfer backends, best first.")] = "nixl,stream",
    restart: Annotated[bool, typer.Option(help="Start a service again that dies.")] = True,
    run_dir: local_options.RunDir = None,
) -> None:
    """Start a local cluster and keep it up until Ctrl-C."""
    from rich.console import Console

    from starmesh.cli.collection import layers_flag, manifest_of, prepare
    from starmesh.cli.local_cluster import ClusterPlan
    from starmesh.cli.predictor_choice import choose_predictor
    from starmesh.cli.up import up as keep_up

    emulating = Emulating(
        engine=engine, profile=profile, speed=speed, kv_tokens=kv_tokens, output_lengths=output_lengths
    )
    emulating.check(predictor=predictor)
    predicting = Predicting(
        predictor=NO_PREDICTOR if emulating.on else predictor,
        directory=predictor_dir,
        collect=collect,
        collect_max_mib=collect_max_mib,
        metrics=predictor_metrics,
    )
    predicting.check(dispatch)
    _check_port(port)
    engine_flags: dict[str, str | int | float] = {
        "--device": device,
        "--dtype": dtype,
        "--kv-memory-mib": kv_memory_mib,
        "--block-tokens": block_tokens,
        "--max-sequences": max_sequences,
        "--max-step-tokens": max_step_tokens,
        "--threads": threads,
        "--transfer": transfer,
    }
    directory = None if emulating.on else model_directory(model)
    try:
        choice = choose_predictor(predicting, directory)
        if collect is not None and directory is not None:
            kept = manifest_of(directory, hidden_layers=choice.hidden_layers, every_tokens=EVERY_TOKENS, dtype=dtype)
            prepare(collect, kept)
            choice = dataclasses.replace(choice, hidden_layers=layers_flag(kept))
    except CliError as error:
        fail(str(error))
    plan = ClusterPlan(
        model=directory,
        run_directory=run_directory(run_dir),
        prefill=prefill,
        decode=decode,
        listen=f"127.0.0.1:{port}",
        ledger=ledger,
        shared_flags=("--cluster", cluster),
        engine_flags=(*flags(engine_flags), *choice.engine_flags),
        router_flags=flags({"--dispatch-policy": dispatch, "--queue-length": queue}),
        rescheduler_flags=("--policy", policy, *(("--record", str(record.absolute())) if record else ())),
        predict=predicting.on,
        predictor_flags=predicting.flags,
    )
    notice = emulating.description if emulating.on else choice.description
    run(keep_up(emulating.apply(plan), Console(), restart=restart, notice=notice))


def demo(
    *,
    model: local_options.Model = DEFAULT_MODEL,
    prefill: local_options.Prefill = 1,
    decode: local_options.Decode = 2,
    device: local_options.Device = "cpu",
    engine: emulation.Engine = "torch",
    profile: emulation.ProfileName = "",
    speed: emulation.Speed = 1.0,
) -> None:
    """Start a local cluster, stream an answer, show the instances, stop."""
    from rich.console import Console

    from starmesh.cli.local_cluster import ClusterPlan
    from starmesh.cli.predictor_choice import choose_predictor
    from starmesh.cli.up import demo as show_demo

    emulating = Emulating(engine=engine, profile=profile, speed=speed)
    emulating.check()
    directory = None if emulating.on else model_directory(model)
    plan = ClusterPlan(
        model=directory,
        run_directory=run_directory(None),
        prefill=prefill,
        decode=decode,
        engine_flags=("--device", device, *choose_predictor(Predicting(), directory).engine_flags),
    )
    run(show_demo(emulating.apply(plan), Console()))


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
    emulating.check(predictor=predictor)
    predicting = Predicting(predictor=NO_PREDICTOR if emulating.on else predictor)
    predicting.check(dispatch)
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


def fetch(
    *,
    name: Annotated[str, typer.Argument(help="Default model, hub id (org/name) or directory.")] = DEFAULT_MODEL,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing when it is here already.")] = False,
) -> None:
    """Download a model, unless it is on this machine already, and print its directory."""
    directory = model_directory(name)
    if not quiet:
        print(directory)


def _check_port(port: int) -> None:
    """Say now that a port is taken, and not after the instances have loaded their model."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            fail(f"cannot listen on port {port}: {error.strerror}; name another with --port, or 0 for a free one")
