"""Try the example clients against live clusters and print what was seen; exit 1 when a client fails a trial."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio

from examples.check.client import Client, Unexpected
from examples.check.clusters import Cluster, NotStarted, start_cluster, start_secured_cluster
from examples.check.languages import LANGUAGES, Language, NotBuilt, copy_sources
from examples.check.trials import PLAIN, SECURED, Trial

SEEN, FAILED, NOT_TRIED = "seen", "FAILED", "-"


async def check(names: list[str], directory: Path) -> bool:
    """Build and try the clients of the named languages; returns whether all that were tried did all that they must."""
    results: dict[str, dict[str, str]] = {}
    sources = copy_sources(directory / "sources")
    async with AsyncExitStack() as stack:
        plain = await stack.enter_async_context(start_cluster(directory / "plain"))
        secured = await stack.enter_async_context(start_secured_cluster(directory / "secured"))
        for name in names:
            results[name] = await check_language(LANGUAGES[name], sources / name, plain, secured)
    print_table(results)
    return all(result != FAILED for column in results.values() for result in column.values())


async def check_language(language: Language, directory: Path, plain: Cluster, secured: Cluster) -> dict[str, str]:
    """The result of each trial, by its name."""
    if missing := language.missing():
        tell(f"{language.name}: not tried, without {', '.join(missing)}; {language.install} installs them")
        return {}
    try:
        client = Client(language.name, await language.build(directory))
    except NotBuilt as error:
        tell(f"{language.name}: {error}")
        return {"build": FAILED}
    results = {"build": SEEN}
    for cluster, trials in ((plain, PLAIN), (secured, SECURED)):
        for trial in trials:
            results[trial.__name__] = await tried(trial, client, cluster)
    return results


async def tried(trial: Trial, client: Client, cluster: Cluster) -> str:
    """The result of one trial; a failure is told at once."""
    try:
        await trial(client, cluster)
    except (Unexpected, TimeoutError, grpc.aio.AioRpcError) as error:
        tell(f"{client.language}, {trial.__name__}: {error or 'took too long'}")
        return FAILED
    return SEEN


def print_table(results: dict[str, dict[str, str]]) -> None:
    """A row for each trial, a column for each language."""
    names = ["build", *(trial.__name__ for trial in (*PLAIN, *SECURED))]
    rows = [["", *results], *([name, *(column.get(name, NOT_TRIED) for column in results.values())] for name in names)]
    for row in rows:
        tell("".join(cell.ljust(18 if index == 0 else 10) for index, cell in enumerate(row)).rstrip())


def tell(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.check", description=__doc__)
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE", help=f"of {', '.join(LANGUAGES)}; none: all")
    names = parser.parse_args().languages or list(LANGUAGES)
    if unknown := [name for name in names if name not in LANGUAGES]:
        parser.error(f"there is no example in {', '.join(unknown)}")
    with tempfile.TemporaryDirectory(prefix="starmesh-examples-") as directory:
        try:
            done = asyncio.run(check(names, Path(directory)))
        except NotStarted as error:
            sys.exit(str(error))
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
