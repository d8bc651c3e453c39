"""Commands that talk to a router (``generate``, ``bench``, ``status``, ``drain``, ``migrate``), their options and help.

What they do is in the modules beside this one, imported only when they run: ``--help`` does not load gRPC.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from starmesh.cli import options
from starmesh.cli.login import ApiKeyFile, TlsCa, read_login
from starmesh.cli.options import DEFAULT_ADDRESS, Asking
from starmesh.cli.run import CliError, fail, run

if TYPE_CHECKING:
    from starmesh.cli.bench_report import Report


def generate(
    *,
    prompt: Annotated[str | None, typer.Argument(help="What to ask; - reads stdin.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    chat: options.Chat = None,
    system: options.System = "",
    max_output_tokens: options.MaxOutputTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    ignore_eos: options.IgnoreEos = False,
    timeout: options.Timeout = 600.0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer only.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
    tls_ca: TlsCa = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Stream the answer to a prompt. Ctrl-C cancels it."""
    from starmesh.cli.generate import generate as stream
    from starmesh.cli.router import connect

    text = _prompt(prompt, file)
    asking = Asking(
        chat=chat,
        system=system,
        max_output_tokens=max_output_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop_strings=tuple(stop or ()),
        seed=seed,
        ignore_eos=ignore_eos,
    )
    login = read_login(tls_ca, api_key_file)

    async def command() -> None:
        async with connect(address, login) as router:
            await stream(router, text, asking, timeout_s=timeout, quiet=quiet)

    run(command(), address=address)


def status(
    *,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between looks with --watch.")] = 1.0,
    sequences: Annotated[bool, typer.Option("--sequences", "-s", help="Show the running requests too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, requests included.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
    tls_ca: TlsCa = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Show the instances of a cluster and how evenly they are loaded."""
    from rich.console import Console

    from starmesh.cli import status as views
    from starmesh.cli.router import connect

    login = read_login(tls_ca, api_key_file)

    async def command() -> None:
        async with connect(address, login) as router:
            if as_json:
                print(await views.status_json(router))
            elif watch:
                await views.watch_status(router, Console(), interval_s=interval, sequences=sequences)
            else:
                await views.show_status(router, Console(), sequences=sequences)

    run(command(), address=address)


def drain(
    *,
    instance: Annotated[str, typer.Argument(help="Id of the instance, as `starmesh status` shows it.")],
    wait: Annotated[bool, typer.Option(help="Wait until it has nothing left.")] = True,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait.")] = 600.0,
    address: options.Address = DEFAULT_ADDRESS,
    tls_ca: TlsCa = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Move everything away from an instance, so that it may be stopped; it takes nothing new."""
    from rich.console import Console

    from starmesh.cli.drain import drain as drain_instance
    from starmesh.cli.router import connect

    login = read_login(tls_ca, api_key_file)

    async def command() -> None:
        async with connect(address, login) as router:
            await drain_instance(router, instance, Console(), wait=wait, timeout_s=timeout)

    run(command(), address=address)


def migrate(
    *,
    request: Annotated[str, typer.Argument(help="Id of the request, as `starmesh status --sequences` shows it.")],
    to: Annotated[str, typer.Option("--to", metavar="INSTANCE", help="Id of the decode instance to move it to.")],
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to follow the move.")] = 60.0,
    address: options.Address = DEFAULT_ADDRESS,
    tls_ca: TlsCa = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Move a running request, KV and all, to another decode instance. Its client sees nothing of it."""
    from rich.console import Console

    from starmesh.cli.migrate import migrate as move
    from starmesh.cli.router import connect

    login = read_login(tls_ca, api_key_file)

    async def command() -> None:
        async with connect(address, login) as router:
            await move(router, request, to, Console(), timeout_s=timeout)

    run(command(), address=address)


def bench(
    *,
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help='JSON Lines of {"prompt": ...} or, for an emulated cluster, {"prompt_tokens": ..., "output_tokens": '
            "...}; .gz; - for stdin.",
        ),
    ],
    rate: Annotated[float | None, typer.Option(help="Requests per second, as a Poisson process.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Without --rate: requests in flight at a time.")] = 16,
    count: Annotated[int | None, typer.Option("--requests", min=1, help="How many. (default: all lines)")] = None,
    arrival_seed: Annotated[int, typer.Option(help="Seed of the arrivals.")] = 0,
    slo_ttft: Annotated[float, typer.Option(min=0, help="Seconds that TTFT may take for goodput.")] = 2.0,
    slo_tpot: Annotated[float, typer.Option(min=0, help="Seconds that TPOT may take for goodput.")] = 0.2,
    json_file: options.JsonFile = None,
    chat: options.Chat = None,
    system: options.System = "",
    max_output_tokens: options.MaxOutputTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    ignore_eos: options.IgnoreEos = False,
    timeout: options.Timeout = 600.0,
    address: options.Address = DEFAULT_ADDRESS,
    tls_ca: TlsCa = None,
    api_key_file: ApiKeyFile = None,
) -> None:
    """Put load on a cluster and measure TTFT, TPOT, ITL, tokens per second and goodput."""
    from rich.console import Console

    from starmesh.cli.bench import Load, read_prompts, requests_of
    from starmesh.cli.bench_command import run_bench, write_json
    from starmesh.cli.bench_report import report_table
    from starmesh.cli.router import connect

    if rate is not None and rate <= 0:
        raise typer.BadParameter("must be more than 0", param_hint="--rate")
    asking = Asking(
        chat=chat,
        system=system,
        max_output_tokens=max_output_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        stop_strings=tuple(stop or ()),
        seed=seed,
        ignore_eos=ignore_eos,
    )

    if json_file is not None and not json_file.absolute().parent.is_dir():
        fail(f"cannot write {json_file}: its directory does not exist")  # rather now than after the load
    try:
        lines = read_prompts(prompts)
    except CliError as error:
        fail(str(error))
    load = Load(requests=count or len(lines), rate=rate, concurrency=concurrency, seed=arrival_seed, timeout_s=timeout)
    login = read_login(tls_ca, api_key_file)

    async def command() -> Report:
        async with connect(address, login) as router:
            requests = await requests_of(router, lines, asking)
            report = await run_bench(router, requests, load, slo_ttft_s=slo_ttft, slo_tpot_s=slo_tpot)
        Console().print(report_table(report))
        if json_file is not None:
            write_json(json_file, load, report)
        return report

    report = run(command(), address=address)
    if all(outcome.error for outcome in report.outcomes):
        first = report.outcomes[0]
        fail(f"every request failed; the first with {first.error}: {first.detail or 'see `starmesh status`'}")


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from where it is. Raises typer.BadParameter unless there is exactly one."""
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give either a prompt or --file", param_hint="PROMPT")
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8")
        else:
            text = sys.stdin.read() if prompt == "-" else str(prompt)
    except OSError as error:
        fail(f"cannot read {file or 'stdin'}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"cannot read {file or 'stdin'}: {error}")
    if not text:
        raise typer.BadParameter("is empty; give some text", param_hint="PROMPT")
    return text
