"""Where a local cluster shows its metrics, for a Prometheus on this machine.

Owns the ports and the file of targets, as ``file_sd_configs`` reads it. Its jobs are the roles, as in
deploy/prometheus/prometheus.yml, so that the same rules and dashboards serve both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from starmesh.cli.service_process import ServiceSpec

TARGETS_FILE: Final = "prometheus-targets.json"


def metrics_address(first_port: int, number: int) -> str:
    """HOST:PORT of the page of the service of this number, counted from 0 at the router."""
    return f"127.0.0.1:{first_port + number}"


def write_targets(specs: Sequence[ServiceSpec], directory: Path) -> Path:
    """The file of targets, of all services that have a page."""
    path = directory / TARGETS_FILE
    targets = [
        {"targets": [spec.metrics_address], "labels": {"job": spec.role}} for spec in specs if spec.metrics_address
    ]
    path.write_text(json.dumps(targets, indent=2) + "\n")
    return path
