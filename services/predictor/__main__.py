"""``python -m services.predictor``"""

import asyncio

from services.predictor.config import PredictorSettings
from starmesh.instance.bare import serve_bare
from starmesh.process import run_service
from starmesh.types import Role


async def serve(settings: PredictorSettings, stop: asyncio.Event) -> None:
    """Serve health and hold a place in the ledger until ``stop``; the predictor does nothing more yet."""
    await serve_bare(settings, Role.PREDICTOR, stop)


if __name__ == "__main__":
    run_service("predictor", PredictorSettings, serve)
