"""A result comes back from its file as it was, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from starmesh.sim import code_version
from starmesh.sim.config import Fault, FaultKind
from starmesh.sim.result import InvalidResult, SimulationResult, config_from_json, config_to_json
from tests.sim.runs import config_of, result_of

pytestmark = pytest.mark.fast

CONFIG = config_of("star", seed=3, faults=(Fault(2.0, FaultKind.DIE, "decode-1"),), measure_until_s=30.0)


def test_a_result_comes_back_as_it_was() -> None:
    result = result_of(CONFIG, slowness=1.5)
    again = SimulationResult.from_json(result.to_json())
    assert again == result
    assert (again.to_json(), again.digest) == (result.to_json(), result.digest)
    assert config_from_json(config_to_json(CONFIG)) == CONFIG == again.config
    assert "\n" not in result.to_json()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 99}, "version 99, not 1: run the simulation again"),
        ({"version": True}, "version True, not 1"),
        ({"tpot": None}, "result.tpot is not an object"),
        ({"preemptions": 1.5}, "result.preemptions is not an integer"),
        ({"more": 1}, "result.more is unknown"),
        ({"series": {}}, "result.series.* is missing"),
    ],
)
def test_what_is_not_exactly_a_result_is_none(change: dict[str, Any], why: str) -> None:
    fields = json.loads(result_of(CONFIG).to_json())
    with pytest.raises(InvalidResult, match=why):
        SimulationResult.from_json(json.dumps(fields | change))


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', "[" * 100_000])
def test_nor_is_any_other_text(text: str) -> None:
    with pytest.raises(InvalidResult):
        SimulationResult.from_json(text)
    with pytest.raises(InvalidResult):
        config_from_json(text)


def test_a_config_that_cannot_be_is_refused() -> None:
    fields = json.loads(config_to_json(CONFIG)) | {"decode_instances": 0}
    with pytest.raises(InvalidResult, match="cannot be: a cluster needs at least one"):
        config_from_json(json.dumps(fields))


def test_the_code_version_follows_what_decides_a_run_and_nothing_else() -> None:
    files = {path.name for path in code_version._files(Path(code_version.__file__).parents[1])}
    assert {"cluster.py", "events.py", "scheduler.py", "table.py", "cost.py", "profile.py", "types.py"} <= files
    assert not {"sweep.py", "page.py", "grpc.py"} & files


def test_the_code_version_covers_all_that_a_run_imports() -> None:
    script = "import sys, starmesh.sim.run; print(*(m.__file__ for n, m in sys.modules.items() if n[:8] == 'starmesh'))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True, timeout=60)
    root = Path(code_version.__file__).parents[1]
    imported = {Path(name) for name in found.stdout.split()} - {root / "__init__.py"}
    assert len(imported) > 50
    assert imported <= set(code_version._files(root))


def test_the_code_version_stays() -> None:
    assert code_version.code_version() == code_version.code_version() != ""
