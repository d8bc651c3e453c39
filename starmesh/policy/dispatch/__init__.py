"""Dispatch: which prefill and which decode instance a request gets first, and why not the others.

Pure: the view, the request and the memory of earlier choices come in; a decision with reasons and the new memory go
out. Instances are taken in the order of their ids, whatever the view's. ``POLICIES`` holds the policies by name; they
differ in how they choose among the decode instances that have room. Prefill instances are always chosen by the fewest
outstanding prompt tokens, since prefill time is linear in them. Owns no reservation and no queue.
"""

from __future__ import annotations

from starmesh.policy.dispatch.decision import (
    Choice,
    Decision,
    DispatchConfig,
    DispatchMemory,
    DispatchRequest,
    NoPlacement,
    Skipped,
    SkipReason,
)
from starmesh.policy.dispatch.policies import POLICIES, DispatchPolicy

__all__ = [
    "POLICIES",
    "Choice",
    "Decision",
    "DispatchConfig",
    "DispatchMemory",
    "DispatchPolicy",
    "DispatchRequest",
    "NoPlacement",
    "SkipReason",
    "Skipped",
]
