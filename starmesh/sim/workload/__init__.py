"""Workloads: when requests come and how long their prompts and outputs are.

Owns arrivals, length models and the readers of trace files. Owns no placement.
"""

from __future__ import annotations

from starmesh.lengths import LENGTH_MODELS
from starmesh.sim.workload.draw import draw_requests
from starmesh.sim.workload.output_cap import output_cap
from starmesh.sim.workload.request import (
    ARRIVALS,
    TRACE,
    SimulatedRequest,
    WorkloadConfig,
    WorkloadError,
)
from starmesh.sim.workload.summary import LengthSummary, WorkloadSummary, describe
from starmesh.sim.workload.trace import read_trace
from starmesh.sim.workload.trace_formats import TRACE_FORMATS, TraceRow

__all__ = [
    "ARRIVALS",
    "LENGTH_MODELS",
    "TRACE",
    "TRACE_FORMATS",
    "LengthSummary",
    "SimulatedRequest",
    "TraceRow",
    "WorkloadConfig",
    "WorkloadError",
    "WorkloadSummary",
    "describe",
    "draw_requests",
    "output_cap",
    "read_trace",
]
