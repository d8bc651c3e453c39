"""Keeps what is known of a live run in a directory, and reads it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.fidelity.live import Conditions
from benchmarks.fidelity.served import Move, Run, Served
from benchmarks.fidelity.spans import Span

REQUESTS = "requests.jsonl"


def keep_all(directory: Path, live: Run, conditions: Conditions, spans: Sequence[Span], logs: Path) -> None:
    """Write all of it, the services' logs among it, and the requests."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "live.json").write_text(json.dumps(asdict(live)))
    (directory / "conditions.json").write_text(json.dumps(asdict(conditions)))
    (directory / "spans.json").write_text(json.dumps([asdict(span) for span in spans]))
    for path in (*logs.glob("*.log"), logs / REQUESTS):
        (directory / path.name).write_bytes(path.read_bytes())


def read_kept(directory: Path, trace: Path) -> tuple[Run, Conditions, list[Span]]:
    """What ``keep_all`` has written. Raises ValueError when that was of other requests than those of ``trace``."""
    if (directory / REQUESTS).read_text() != trace.read_text():
        raise ValueError(f"{directory} was kept of other requests; compare with the plan that it was made with")
    found = json.loads((directory / "live.json").read_text())
    live = Run(
        served=tuple(Served(**each) for each in found["served"]),
        moves=tuple(Move(**each) for each in found["moves"]),
        preemptions=found["preemptions"],
        unserved=found["unserved"],
    )
    conditions = Conditions(**json.loads((directory / "conditions.json").read_text()))
    spans = [Span(**each) for each in json.loads((directory / "spans.json").read_text())]
    return live, conditions, spans
