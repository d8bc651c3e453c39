"""``starmesh up`` and ``starmesh demo``: a local cluster in the foreground, and one that shows itself and ends."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

import grpc.aio
from rich.console import Console
from rich.live import Live

from starmesh.cli.generate import generate
from starmesh.cli.http_option import http_lines
from starmesh.cli.local_cluster import ClusterPlan, LocalCluster, start_cluster
from starmesh.cli.options import Asking
from starmesh.cli.router import connect
from starmesh.cli.run import cancel_on_signals
from starmesh.cli.status import observe, show_status

DEMO_PROMPT = "Explain in three sentences why the sky is blue."
_DEMO_OUTPUT_TOKENS = 96
_DEMO_TIMEOUT_S = 120.0
_REFRESH_S = 1.0


async def up(plan: ClusterPlan, console: Console, *, restart: bool, notice: str) -> None:
    """Keep a cluster up until SIGINT or SIGTERM, with a live table on a terminal. ``notice`` says what is special about
    it, such as what predicts.

    Raises CliError as ``start_cluster``.
    """
    cancel_on_signals()
    try:
        with console.status("starting the cluster") as spinner:
            async with start_cluster(plan, reporter(console)) as cluster:
                spinner.stop()
                console.print(f"the cluster is ready at {cluster.address}; Ctrl-C stops it. In another terminal:")
                options = f"{cluster.security.client_options} " if cluster.security is not None else ""
                console.print(
                    f'  starmesh generate --address {cluster.address} {options}"Why is the sky blue?"',
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )
                for line in http_lines(plan.http, cluster.security) if plan.http else ():
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                console.print(notice, markup=False, highlight=False, soft_wrap=True)
                if cluster.metrics:
                    for instance_id, url in cluster.metrics.items():
                        console.print(f"metrics of {instance_id}: {url}", soft_wrap=True)
                    console.print(
                        f"Prometheus finds them all by file_sd_configs: {cluster.targets_file}", soft_wrap=True
                    )
                if cluster.ledger_socket:
                    console.print(f"other services join it with --ledger {cluster.ledger_socket}", soft_wrap=True)
                try:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(cluster.supervise(restart=restart))
                        tasks.create_task(_show(cluster, console))
                except asyncio.CancelledError:
                    console.print(f"stopping: streams have {plan.grace_s:g} s to end; Ctrl-C again ends them now")
                    raise
    except asyncio.CancelledError:
        console.print("the cluster has stopped")


async def demo(plan: ClusterPlan, console: Console) -> None:
    """Start a cluster, stream an answer, show the instances, stop everything.

    Raises CliError as ``start_cluster``, AioRpcError when the cluster does not answer.
    """
    cancel_on_signals()
    asking = Asking(temperature=0.0, max_output_tokens=_DEMO_OUTPUT_TOKENS)
    with console.status("starting the cluster") as spinner:
        async with start_cluster(plan, reporter(console)) as cluster, connect(cluster.address, cluster.login) as router:
            spinner.stop()
            console.print(f"\n> {DEMO_PROMPT}", style="bold", highlight=False)
            await generate(router, DEMO_PROMPT, asking, timeout_s=_DEMO_TIMEOUT_S, quiet=False)
            console.print()
            await show_status(router, console)
    console.print("the cluster has stopped")


def reporter(console: Console) -> Callable[[str], None]:
    """Prints lines as they are: they hold paths and ends of logs, not markup."""
    return functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)


async def _show(cluster: LocalCluster, console: Console) -> None:
    """Keep a live table at the end of the terminal; a router that dies is waited for."""
    if not console.is_terminal:
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            try:
                async with connect(cluster.address, cluster.login) as router:
                    async for table in observe(router, interval_s=_REFRESH_S):
                        live.update(table, refresh=True)
            except grpc.aio.AioRpcError:
                live.update("the router does not answer", refresh=True)
            await asyncio.sleep(_REFRESH_S)
