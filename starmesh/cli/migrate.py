"""``starmesh migrate``: moves a running request to another decode instance and tells how far it is."""

from __future__ import annotations

from rich.console import Console

from starmesh.cli.router import RouterClient
from starmesh.cli.run import CliError
from starmesh.rpc import convert_migration
from starmesh.v1 import cluster_pb2, decode_pb2


async def migrate(router: RouterClient, request_id: str, target: str, console: Console, *, timeout_s: float) -> None:
    """Ask for the move and follow it to its end. Ctrl-C stops following; the move goes on.

    Raises CliError when the request did not move, AioRpcError when it was not even tried.
    """
    request = cluster_pb2.MigrateSequenceRequest(request_id=request_id, target_instance_id=target)
    last = cluster_pb2.MigrateSequenceResponse()
    said = ""
    async for last in router.cluster.MigrateSequence(request, timeout=timeout_s):
        line = describe(last)
        if line != said:
            console.print(line, highlight=False, markup=False)
            said = line
    if last.progress.stage != decode_pb2.MIGRATION_STAGE_MOVED:
        raise CliError(f"{request_id} has not moved; see `starmesh status --sequences` for what runs where")


def describe(response: cluster_pb2.MigrateSequenceResponse) -> str:
    """One line on how far the move is."""
    progress = response.progress
    source, target = response.source_instance_id, progress.target_instance_id
    frozen_ms = progress.frozen_duration.seconds * 1e3 + progress.frozen_duration.nanos / 1e6
    copied = f"{progress.copied_blocks} blocks ({progress.transfer_bytes / 1e6:.1f} MB)"
    match progress.stage:
        case decode_pb2.MIGRATION_STAGE_RESERVING:
            return f"from {source}: {target} is setting blocks aside"
        case decode_pb2.MIGRATION_STAGE_COPYING:
            return f"copying, round {progress.rounds}: {copied} are at {target}; it goes on at {source} meanwhile"
        case decode_pb2.MIGRATION_STAGE_FREEZING | decode_pb2.MIGRATION_STAGE_COMMITTING:
            return f"standing still for the last blocks; {copied} are at {target}"
        case decode_pb2.MIGRATION_STAGE_TAKING_BACK:
            return f"{target} has not answered: {source} is taking it back"
        case decode_pb2.MIGRATION_STAGE_MOVED:
            rounds = f"{progress.rounds} round{'s' * (progress.rounds != 1)}"
            return f"moved to {target}: {copied} in {rounds}, standing still for {frozen_ms:.0f} ms"
        case decode_pb2.MIGRATION_STAGE_STAYED:
            return f"goes on at {source}: {_why(progress)}"
        case decode_pb2.MIGRATION_STAGE_ENDED:
            return f"has ended at {source}: {_why(progress)}"
        case decode_pb2.MIGRATION_STAGE_IN_DOUBT:
            return "nobody could say who owns it: its router finds out, and prefills it again if it has to"
        case _:
            return "under way"


def _why(progress: decode_pb2.MigrateResponse) -> str:
    if progress.cause == decode_pb2.MIGRATION_CAUSE_REFUSED:
        return f"{progress.target_instance_id} does not take it ({convert_migration.refusal_words(progress.refusal)})"
    return convert_migration.cause_words(progress.cause) if progress.cause else "it was not said why"
