"""Measures an instance on this machine, for a profile: how long its steps take (``steps``), how fast KV goes from one
process to another (``pulls``), and the profile that comes of both (``measure``, the only one that loads torch).
"""

from __future__ import annotations


class MeasuringFailed(Exception):
    """No measurement can be had; the message says what to do."""
