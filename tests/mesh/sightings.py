"""What load reports say of running sequences, as an operator sees them at the router."""

from __future__ import annotations

from dataclasses import dataclass

from starmesh.v1 import cluster_pb2
from tests.mesh.processes import Mesh


@dataclass(frozen=True)
class Sighting:
    """A sequence in a report, ``age`` tokens after its last sample that was answered; None without any."""

    instance_id: str
    request_id: str
    output_tokens: int
    remaining: int | None
    upper: int | None
    age: int | None

    @property
    def sampled_at(self) -> int | None:
        """How many tokens it had when its estimate was made."""
        return None if self.age is None else self.output_tokens - self.age


async def sightings(mesh: Mesh) -> dict[str, Sighting]:
    """By request; from the ledger."""
    return {seen.request_id: seen for instance in await mesh.instances() for seen in _seen(instance)}


async def sightings_at(mesh: Mesh, name: str) -> dict[str, Sighting]:
    """By request; from the instance itself, as of now."""
    return {seen.request_id: seen for seen in _seen((await mesh.instance(name)).instance)}


def _seen(instance: cluster_pb2.Instance) -> list[Sighting]:
    if not instance.instance_id.startswith("decode"):
        return []
    return [
        Sighting(
            instance.instance_id,
            load.request_id,
            load.output_tokens,
            load.remaining_tokens if load.HasField("remaining_tokens") else None,
            load.remaining_tokens_upper if load.HasField("remaining_tokens_upper") else None,
            load.prediction_age_tokens if load.HasField("prediction_age_tokens") else None,
        )
        for load in instance.load.sequences
    ]
