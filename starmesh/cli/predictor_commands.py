"""``starmesh predictor``: its commands, their options and help.

What they do is in the modules beside this one, imported only when they run: ``--help`` loads neither gRPC nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from starmesh.cli import local_options, options
from starmesh.cli.login import ApiKeyFile, Login, TlsCa, read_login
from starmesh.cli.options import DEFAULT_ADDRESS
from starmesh.cli.run import CliError, fail, run

Kind = Literal["starmesh", "mlp", "linear", "counts"]
Samples = Annotated[
    Path, typer.Argument(metavar="DIR", help="What `starmesh predictor collect` stored.", show_default=False)
]
SplitSeed = Annotated[int, typer.Option(help="Seed of the split into what teaches and what is held out.")]

predictor_app = typer.Typer(help="Predict how many tokens requests still have to generate.", no_args_is_help=True)


@predictor_app.command()
def status(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
    tls_ca: TlsCa = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Show which predictor answers, and how well it does by its requests' progress."""
    from rich.console import Console

    from starmesh.cli import predictor_status as views
    from starmesh.cli.router import connect

    login = read_login(tls_ca, api_key_file)

    async def command() -> None:
        async with connect(address, login) as router:
            if as_json:
                print(await views.predictor_json(router))
            else:
                await views.show_predictor(router, Console())

    run(command(), address=address)


@predictor_app.command()
def promote(
    *,
    version: Annotated[str, typer.Argument(help="A version that `starmesh predictor status` lists.")],
    address: options.Address = DEFAULT_ADDRESS,
    tls_ca: TlsCa = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Have another version of the predictor answer from now on, without a restart."""
    from rich.console import Console

    from starmesh.cli import predictor_status as views
    from starmesh.cli.router import connect

    login = read_login(tls_ca, api_key_file)

    async def command() -> None:
        async with connect(address, login) as router:
            await views.promote(router, version, Console())

    run(command(), address=address)


@predictor_app.command()
def collect(
    *,
    prompts: Annotated[str, typer.Argument(metavar="FILE", help='JSON Lines of {"prompt": ...}; .gz; - for stdin.')],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where samples go. What is there already is not asked again.")
    ] = None,
    router: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Use this running cluster, which collects already.")
    ] = "",
    requests: Annotated[int | None, typer.Option(min=1, help="How many in all. (default: all prompts)")] = None,
    samples_per_prompt: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 1,
    max_output_tokens: Annotated[
        int, typer.Option("--max-output-tokens", "--max-tokens", "-n", min=1, max=2**31 - 1, help="Cuts an answer.")
    ] = 1024,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.7,
    seed: Annotated[
        int, typer.Option(help="Seed of the prompts' order; the sampling goes by each request's name.")
    ] = 0,
    model: local_options.Model = local_options.DEFAULT_MODEL,
    decode: Annotated[int, typer.Option(min=1, help="Decode instances.")] = 1,
    hidden_layers: Annotated[
        str,
        typer.Option(
            metavar="LAYERS", help="Whose outputs are stored, as in 20,30. (default: those that kinds look at)"
        ),
    ] = "",
    every_tokens: Annotated[int, typer.Option(min=1, help="Tokens between two samples of a request.")] = (
        local_options.EVERY_TOKENS
    ),
    device: local_options.Device = "cpu",
    dtype: local_options.Dtype = "float32",
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences in a batch: the larger, the faster.")] = 64,
    kv_memory_mib: Annotated[int, typer.Option(min=1, help="Memory for KV blocks, per decode instance.")] = 2048,
    threads: local_options.Threads = 1,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight. (default: an eighth more than batches hold)")
    ] = None,
    max_mib: Annotated[int, typer.Option(min=1, help="Disk space that the samples may take.")] = 16384,
    timeout: options.Timeout = 3600.0,
    run_dir: local_options.RunDir = None,
    tls_ca: TlsCa = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Collect samples to train a predictor with: answer prompts on a local cluster and store hidden states, no text.

    Interrupted by Ctrl-C, the same command goes on later. Request p12-0 is the first answer to line 12, from 0; its
    sampling is seeded by that name.
    """
    from rich.console import Console

    from starmesh.cli.bench import read_prompts
    from starmesh.cli.collect import Conditions
    from starmesh.cli.collect_command import collect_all
    from starmesh.cli.collection import digest, layers_flag, manifest_of, plan_requests, prepare
    from starmesh.cli.local_cluster import ClusterPlan

    if out is None and not router:
        raise typer.BadParameter("is needed, unless a running cluster collects (--router)", param_hint="--out")
    where: ClusterPlan | str = router
    try:
        lines = read_prompts(prompts)
        if out is not None and not router:
            directory = local_options.model_directory(model)
            manifest = manifest_of(
                directory,
                hidden_layers=hidden_layers,
                every_tokens=every_tokens,
                dtype=dtype,
                max_output_tokens=max_output_tokens,
                temperature=temperature,
            )
            prepare(out, manifest, digest(lines))
            engine: dict[str, str | int | float] = {
                "--device": device,
                "--dtype": dtype,
                "--threads": threads,
                "--hidden-layers": layers_flag(manifest),
                "--hidden-every-tokens": every_tokens,
            }
            # A trained one would refuse samples of other layers than its own.
            predicting = local_options.Predicting(
                predictor=local_options.ONLINE_PREDICTOR, collect=out, collect_max_mib=max_mib
            )
            where = ClusterPlan(
                model=directory,
                run_directory=local_options.run_directory(run_dir),
                decode=decode,
                engine_flags=local_options.flags(engine),
                decode_flags=local_options.flags({"--max-sequences": max_sequences, "--kv-memory-mib": kv_memory_mib}),
                # Requests wait for room as long as it takes, and stay where they are.
                router_flags=local_options.flags({"--queue-timeout-s": timeout}),
                rescheduler_flags=("--policy", "none"),
                predictor_flags=predicting.flags,
            )
    except CliError as error:
        fail(str(error))
    conditions = Conditions(
        max_output_tokens=max_output_tokens,
        temperature=temperature,
        concurrency=concurrency or decode * (max_sequences + -(-max_sequences // 8)),
        timeout_s=timeout,
    )
    planned = plan_requests(lines, requests=requests, samples_per_prompt=samples_per_prompt, seed=seed)
    login = read_login(tls_ca, api_key_file) if router else Login()
    run(collect_all(where, planned, conditions, out, Console(), login=login), address=router)


@predictor_app.command()
def train(
    *,
    directory: Samples,
    kind: Annotated[Kind, typer.Option(help="What it looks at and how.")] = "starmesh",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where it goes. (default: named for model and kind, here)")
    ] = None,
    seed: SplitSeed = 0,
    device: local_options.Device = "cpu",
    epochs: Annotated[int, typer.Option(min=1, help="At most; it stops early when it learns no more.")] = 100,
    layer: Annotated[int | None, typer.Option(min=1, help="Layer to look at. (default: as the kind does)")] = None,
    final: Annotated[
        bool, typer.Option("--final", help="Hold no requests out: for the predictor to serve, when its error is known.")
    ] = False,
) -> None:
    """Train a predictor on collected samples, and show how it does on requests that it has not seen."""
    from rich.console import Console

    with _training():
        from starmesh.prediction.training.command import train as fit

        fit(
            Console(),
            directory=directory,
            kind=kind,
            out=out,
            seed=seed,
            device=device,
            epochs=epochs,
            layer=layer,
            final=final,
        )


@predictor_app.command()
def evaluate(
    *,
    directory: Samples,
    predictor: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What to score. (default: the one shipped for the model)")
    ] = None,
    seed: SplitSeed = 0,
) -> None:
    """Score a predictor on the collected samples that training with the same seed holds out."""
    from rich.console import Console

    with _training():
        from starmesh.prediction.predictor_file import shipped_predictor
        from starmesh.prediction.shards import read_manifest
        from starmesh.prediction.training.command import evaluate as score

        manifest = read_manifest(directory)
        file = predictor or shipped_predictor(manifest.layout.model_revision)
        if file is None:
            raise ValueError(f"none ships for {manifest.model}; name one with --predictor")
        score(Console(), directory=directory, predictor=file, seed=seed)


@contextmanager
def _training() -> Iterator[None]:
    """One line, and exit code 1, for what cannot be trained with."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed; training needs `pip install starmesh[engine]`")
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
