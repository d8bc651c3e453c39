"""Workloads: when requests come and how long their prompts and outputs are.

Owns arrivals, length models and the readers of trace files. Owns no placement.
"""

from __future__ import annotations

from starmesh.sim.workload.request import SimulatedRequest, WorkloadConfig

__all__ = ["SimulatedRequest", "WorkloadConfig"]
