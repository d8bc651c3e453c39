"""Plans recorded rounds again: ``python -m services.rescheduler.replay FILE``.

Owns reading a recording and the comparison. The plan of each round must be equal, memory and reasons included.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from starmesh.policy.rescheduling import Plan, plan
from starmesh.policy.rescheduling.plain import to_plain
from starmesh.policy.rescheduling.record import InvalidRecord, RecordedRound, decode_round

_SHOWN_LINES: Final = 60
_USAGE: Final = "usage: python -m services.rescheduler.replay FILE, a file written with --record"


@dataclass(frozen=True, slots=True)
class Replay:
    """``rounds`` planned again until the end or, in the last of them, the first difference; empty if all are equal."""

    rounds: int
    migrations: int
    difference: str


def read_rounds(path: Path) -> Iterator[RecordedRound]:
    """The rounds of a recording. A last line without an end is ignored: its process was killed as it wrote. Raises
    OSError, and InvalidRecord naming the line."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield decode_round(line)
            except InvalidRecord as error:
                raise InvalidRecord(f"line {number} of {path}: {error}") from None


def replay(path: Path) -> Replay:
    """Plan each round again. Raises as ``read_rounds``."""
    rounds = migrations = 0
    for recorded in read_rounds(path):
        again = plan(recorded.view, recorded.memory, recorded.config)
        rounds += 1
        migrations += len(recorded.plan.migrations)
        if again != recorded.plan:
            return Replay(rounds, migrations, _difference(recorded.plan, again))
    return Replay(rounds, migrations, "")


def _difference(recorded: Plan, again: Plan) -> str:
    """What differs, for people; the first lines of it."""
    before, after = (json.dumps(to_plain(decided), indent=1).splitlines() for decided in (recorded, again))
    lines = difflib.unified_diff(before, after, "recorded", "planned again", lineterm="")
    return "\n".join(islice(lines, _SHOWN_LINES))


def main(arguments: list[str]) -> int:
    """Returns 0 when all rounds are equal, 1 when one is not, 2 when the file cannot be read."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(_USAGE, file=sys.stderr)  # noqa: T201
        return 2
    try:
        found = replay(Path(arguments[0]))
    except (OSError, InvalidRecord, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    if found.difference:
        print(f"round {found.rounds} is planned differently:\n{found.difference}")  # noqa: T201
        return 1
    print(f"{found.rounds} rounds with {found.migrations} migrations, planned again: all equal")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
