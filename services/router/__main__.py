"""``python -m services.router``"""

import asyncio

from services.router.config import RouterSettings
from services.router.model import ServedModel
from services.router.serving import RouterProcess
from starmesh.model_files import fetch_model
from starmesh.process import run_service
from starmesh.telemetry.ledger_metrics import LedgerMetrics
from starmesh.types import Role


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Serve until ``stop``, then let the streams in flight end within the grace period."""
    model = await asyncio.to_thread(_load, settings)
    async with settings.open_metrics(Role.ROUTER.value) as metrics:
        ledger = settings.open_ledger()
        ledger.on_operation = LedgerMetrics(metrics.meter)
        try:
            async with RouterProcess(settings, ledger, model, metrics):
                await stop.wait()
        finally:
            await ledger.close()


def _load(settings: RouterSettings) -> ServedModel:
    if settings.emulation is not None:
        return ServedModel.emulated(settings.emulation, lengths=settings.output_lengths)
    return ServedModel.load(fetch_model(settings.model))


if __name__ == "__main__":
    run_service("router", RouterSettings, serve)
