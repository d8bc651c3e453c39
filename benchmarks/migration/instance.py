"""The decode instance of ``benchmarks.migration``: the product's own, with limits of migration that suit it.

``python -m benchmarks.migration.instance [--stop-and-copy] ...``, with the flags of a decode instance otherwise.
"""

from __future__ import annotations

import dataclasses

from pydantic import Field

from services.decode.__main__ import serve
from services.decode.config import DecodeSettings, MigratorConfig
from starmesh.migration.terms import Limits
from starmesh.process import run_service

STOP_BLOCKS = 1 << 20
"""More tail blocks than any sequence has: no copy round begins, and all of it moves while it stands still."""
WAIT_S = 60.0
"""Stop-and-copy of a long sequence takes longer than a commit is waited for where only a tail is left."""


class InstanceSettings(DecodeSettings):
    """A decode instance's."""

    stop_and_copy: bool = Field(False, description="freeze a sequence first, then copy all of it")

    @property
    def migrator(self) -> MigratorConfig:
        """The product's limits, but for the waits for a commit and, with ``stop_and_copy``, the tail."""
        limits = Limits(commit_s=WAIT_S, claim_s=WAIT_S)
        if self.stop_and_copy:
            limits = dataclasses.replace(limits, tail_blocks=STOP_BLOCKS)
        return dataclasses.replace(super().migrator, limits=limits)


if __name__ == "__main__":
    run_service("decode", InstanceSettings, serve)
