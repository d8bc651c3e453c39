"""All migrations of a decode instance: those that leave and those that come, and how many there are."""

from __future__ import annotations

from services.decode.claims import Claims
from services.decode.config import MigratorConfig
from services.decode.incoming import IncomingMigrations
from services.decode.metrics import DecodeMetrics
from services.decode.outgoing import MoveAsked, OutgoingMigrations
from services.decode.running import Sequences
from services.decode.source_migration import SourceMigration
from starmesh.instance.instance import Instance, MigrationCounts


class Migrator:
    """Moves sequences out and takes others in. The worker's, which tells it what happens to them."""

    def __init__(
        self, instance: Instance, sequences: Sequences, config: MigratorConfig, metrics: DecodeMetrics
    ) -> None:
        claims = Claims(instance.ledger, ttl_s=config.owner_ttl_s)
        self.outgoing = OutgoingMigrations(instance, sequences, claims, config, metrics)
        self.incoming = IncomingMigrations(instance, sequences, claims, config)

    def __repr__(self) -> str:
        return f"<Migrator: {len(self.outgoing)} out, {len(self.incoming)} in>"

    def migrate(self, asked: MoveAsked) -> SourceMigration:
        """Begin to move a sequence away, or return the migration under way for it; ``await migration.outcome()`` tells
        how it ended. Raises StatusError, as ``OutgoingMigrations.begin``."""
        return self.outgoing.begin(asked)

    def counts(self) -> MigrationCounts:
        """For the instance's load."""
        return MigrationCounts(incoming=len(self.incoming), outgoing=len(self.outgoing), migrated=self.incoming.started)

    def close(self) -> None:
        """Begin none any more, and give up those that come. Those that leave end with their sequences."""
        self.outgoing.close()
        self.incoming.close()
