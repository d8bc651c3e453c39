"""Each example client shows all that it must against live clusters of emulated instances.

Where a language's toolchain is not on the machine its tests are skipped, with the command that installs it; so they are
where the registry of its packages does not answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from examples.check.client import Client
from examples.check.clusters import Cluster, start_cluster, start_secured_cluster
from examples.check.languages import LANGUAGES, REPOSITORY, Unreachable, copy_sources
from examples.check.trials import PLAIN, SECURED, Trial

# The first test of a language waits for its build: half a minute of CPU for C++, and npm's waits for its registry.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(1200)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with start_cluster(tmp_path_factory.mktemp("plain")) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def secured(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    async with start_secured_cluster(tmp_path_factory.mktemp("secured")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=list(LANGUAGES))
async def client(request: pytest.FixtureRequest, sources: Path) -> Client:
    language = LANGUAGES[request.param]
    if missing := language.missing():
        pytest.skip(f"the {language.name} example needs {', '.join(missing)}: {language.install}")
    try:
        command = await language.build(sources / language.name)
    except Unreachable as error:
        pytest.skip(f"the {language.name} example's packages cannot be had here: {error}")
    return Client(language.name, command)


@pytest.mark.parametrize("trial", PLAIN, ids=lambda trial: trial.__name__)
async def test_client(trial: Trial, client: Client, plain: Cluster) -> None:
    await trial(client, plain)


@pytest.mark.parametrize("trial", SECURED, ids=lambda trial: trial.__name__)
async def test_client_of_a_secured_cluster(trial: Trial, client: Client, secured: Cluster) -> None:
    await trial(client, secured)


async def test_the_lock_file_pins_versions_and_leaves_the_registry_to_the_user() -> None:
    lock = json.loads((REPOSITORY / "examples/node/package-lock.json").read_text())
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert all("integrity" in package and "resolved" not in package for package in packages.values())
