"""One life of a decode instance."""

from __future__ import annotations

from tests.migration.source_model import SourceShell
from tests.migration.target_model import TargetShell


class Instance(SourceShell, TargetShell):
    """Engine, worker and both ends of the migrator; what a crash takes away."""
