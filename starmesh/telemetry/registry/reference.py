"""``python -m starmesh.telemetry.registry.reference docs/metrics.md``: writes the tables of metrics into the page,
between its markers.

Owns the tables' form. What they say is the registry's; a test holds the page to them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from starmesh.telemetry.registry import METRICS
from starmesh.telemetry.registry.metric import Metric
from starmesh.types import Role

BEGIN: Final = "<!-- metrics: begin -->\n"
END: Final = "<!-- metrics: end -->\n"


def tables() -> str:
    """A section for each set of roles, in the order of the registry."""
    sections: dict[tuple[Role, ...], list[Metric]] = {}
    for row in METRICS:
        sections.setdefault(row.roles, []).append(row)
    return "\n".join(_section(roles, rows) for roles, rows in sections.items())


def updated(page: str) -> str:
    """The page with the tables of today. Raises ValueError for one without the markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after and END not in rest:
        raise ValueError(f"the page has no {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}{tables()}{END}{after}"


def _section(roles: tuple[Role, ...], rows: list[Metric]) -> str:
    who = "every service" if roles == tuple(Role) else " and ".join(role.value for role in roles)
    head = "| metric | in Prometheus | labels | what |\n| --- | --- | --- | --- |\n"
    return f"### {who[0].upper()}{who[1:]}\n\n{head}{''.join(map(_line, rows))}"


def _line(row: Metric) -> str:
    unit = f", {row.unit.strip('{}')}" if row.unit != "1" else ""
    labels = ", ".join(f"`{label}`" for label in row.labels)
    kind = f"{row.prometheus_type}{unit}"
    return f"| `{row.name}` ({kind}) | `{row.prometheus_name}` | {labels} | {row.description} |\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
