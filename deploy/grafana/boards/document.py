"""A dashboard as Grafana loads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from boards.panels import INSTANCE, Dashboard, Panel
from starmesh.telemetry.registry import instance

DATASOURCE: Final = {"type": "prometheus", "uid": "prometheus"}
WIDTH, HEIGHT, PER_ROW = 8, 8, 3


def document(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana loads."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "tags": ["starmesh"],
        "schemaVersion": 39,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [{"type": "dashboards", "title": "starmesh", "tags": ["starmesh"], "keepTime": True}],
        "templating": {"list": [_choice()] if dashboard.chosen else []},
        "panels": list(_placed(dashboard.rows)),
    }


def text(dashboard: Dashboard) -> str:
    """The file."""
    return json.dumps(document(dashboard), indent=1) + "\n"


def _choice() -> dict[str, Any]:
    return {
        "name": "instance",
        "label": "instance",
        "type": "query",
        "datasource": DATASOURCE,
        "query": f"label_values({instance.KV_TOTAL_BLOCKS.prometheus_name}, {INSTANCE})",
        "refresh": 2,
        "sort": 1,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _placed(rows: Iterable[tuple[str, Sequence[Panel]]]) -> Iterator[dict[str, Any]]:
    """Panels in their places, three in a row, each with a number of its own."""
    number = top = 0
    for title, panels in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": PER_ROW * WIDTH, "h": 1},
        }
        top += 1
        for place, panel in enumerate(panels):
            number += 1
            down, right = divmod(place, PER_ROW)
            grid = {"x": right * WIDTH, "y": top + down * HEIGHT, "w": WIDTH, "h": HEIGHT}
            yield {"id": number, "gridPos": grid, **_graph(panel)}
        top += -(-len(panels) // PER_ROW) * HEIGHT


def _graph(panel: Panel) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none"}
    custom = {"lineWidth": 1, "fillOpacity": 25 if panel.stacked else 8, "showPoints": "never", "stacking": stacking}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": DATASOURCE, "expr": curve.expr, "legendFormat": curve.legend}
            for place, curve in enumerate(panel.curves)
        ],
    }
