"""Commands of this machine: ``up``, ``demo`` and ``model fetch``, their options and help.

What they do is in the modules beside this one, imported only when they run: ``--help`` loads neither gRPC nor a model.
"""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Annotated, Literal

import typer

from starmesh.cli import emulating as emulation
from starmesh.cli import local_options
from starmesh.cli.emulating import Emulating
from starmesh.cli.http_option import Http, http_address
from starmesh.cli.local_options import (
    DEFAULT_MODEL,
    EVERY_TOKENS,
    DispatchPolicy,
    Predicting,
    ReschedulingPolicy,
    flags,
    model_directory,
    run_directory,
)
from starmesh.cli.run import CliError, fail, run

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
    http: Http = None,
    ledger: Annotated[
        str, typer.Option(envvar="STARMESH_LEDGER", metavar="URL", help="Redis to use. (default: one of its own)")
    ] = "",
    cluster: Annotated[str, typer.Option(help="Name of the cluster; several may share a Redis.")] = "default",
    dispatch: Annotated[DispatchPolicy, typer.Option(help="How decode instances are chosen.")] = "least_tokens",
    policy: Annotated[ReschedulingPolicy, typer.Option(help="How running requests are rebalanced.")] = "star_plus",
    predictor: local_options.Predictor = "",
    predictor_dir: local_options.PredictorDir = None,
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
    transfer: Annotated[
        Transfer | None,
        typer.Option(help="KV transfer backends, best first. (default: nixl,stream; with --tls stream, the encrypted)"),
    ] = None,
    tls: Annotated[
        bool, typer.Option("--tls", help="Mutual TLS between services and an API key, made for this cluster.")
    ] = False,
    metrics: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=1,
            max=65_000,
            help="Show metrics for Prometheus: the router on this port, the others on those after it. (default: none)",
        ),
    ] = None,
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
    predicting = Predicting(
        predictor=predictor,
        directory=predictor_dir,
        collect=collect,
        collect_max_mib=collect_max_mib,
    )
    predicting.check(dispatch)
    emulating.check(predicting)
    _check_port(port)
    http_listen = http_address(http, encrypted=tls)
    engine_flags: dict[str, str | int | float] = {
        "--device": device,
        "--dtype": dtype,
        "--kv-memory-mib": kv_memory_mib,
        "--block-tokens": block_tokens,
        "--max-sequences": max_sequences,
        "--max-step-tokens": max_step_tokens,
        "--threads": threads,
        **({"--transfer": transfer} if transfer is not None else {}),
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
        http=http_listen,
        ledger=ledger,
        shared_flags=("--cluster", cluster),
        engine_flags=(*flags(engine_flags), *choice.engine_flags),
        router_flags=flags({"--dispatch-policy": dispatch, "--queue-length": queue}),
        rescheduler_flags=("--policy", policy, *(("--record", str(record.absolute())) if record else ())),
        predict=predicting.on,
        tls=tls,
        metrics_port=metrics or 0,
        predictor_flags=predicting.flags,
    )
    for spec in plan.services(ledger):
        if spec.metrics_address:
            _check_port(int(spec.metrics_address.rpartition(":")[2]), "--metrics")
    notice = f"{emulating.description}; {choice.description}" if emulating.on else choice.description
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
    emulating.check(Predicting())
    directory = None if emulating.on else model_directory(model)
    plan = ClusterPlan(
        model=directory,
        run_directory=run_directory(None),
        prefill=prefill,
        decode=decode,
        engine_flags=("--device", device, *choose_predictor(Predicting(), directory).engine_flags),
    )
    run(show_demo(emulating.apply(plan), Console()))


def fetch(
    *,
    name: Annotated[str, typer.Argument(help="Default model, hub id (org/name) or directory.")] = DEFAULT_MODEL,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing when it is here already.")] = False,
) -> None:
    """Download a model, unless it is on this machine already, and print its directory."""
    directory = model_directory(name)
    if not quiet:
        print(directory)


def _check_port(port: int, option: str = "--port, or 0 for a free one") -> None:
    """Say now that a port is taken, and not after the instances have loaded their model."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            fail(f"cannot listen on port {port}: {error.strerror}; name another with {option}")
