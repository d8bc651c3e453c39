"""``python -m services.rescheduler``"""

import asyncio

from services.rescheduler.config import ReschedulerSettings
from starmesh.instance.bare import serve_bare
from starmesh.process import run_service
from starmesh.types import Role


async def serve(settings: ReschedulerSettings, stop: asyncio.Event) -> None:
    """Serve health and hold a place in the ledger until ``stop``; the rescheduler does nothing more yet."""
    await serve_bare(settings, Role.RESCHEDULER, stop)


if __name__ == "__main__":
    run_service("rescheduler", ReschedulerSettings, serve)
