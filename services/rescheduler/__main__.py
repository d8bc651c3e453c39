"""``python -m services.rescheduler``"""

import asyncio

from services.rescheduler.config import ReschedulerSettings
from services.rescheduler.lead import Lead
from services.rescheduler.loop import Rescheduler
from services.rescheduler.recorder import Recorder
from starmesh.instance.bare import open_bare
from starmesh.process import run_service
from starmesh.types import Role


async def serve(settings: ReschedulerSettings, stop: asyncio.Event) -> None:
    """Serve health, and lead or stand by, until ``stop``."""
    config = settings.rescheduling()
    async with (
        settings.open_metrics(Role.RESCHEDULER.value) as metrics,
        open_bare(settings, Role.RESCHEDULER, metrics=metrics) as instance,
    ):
        info = instance.info
        recorder = None
        if settings.record is not None:
            recorder = Recorder(settings.record, max_bytes=settings.record_max_mib << 20)
        try:
            lead = Lead(instance.ledger, info.instance_id, info.incarnation, ttl_s=settings.lead_ttl_s)
            loop = Rescheduler(
                instance.ledger,
                lead,
                config,
                interval_s=settings.round_interval_s,
                recorder=recorder,
                credentials=instance.credentials,
                metrics=metrics,
            )
            await loop.run(stop)
        finally:
            if recorder is not None:
                await recorder.close()


if __name__ == "__main__":
    run_service("rescheduler", ReschedulerSettings, serve)
