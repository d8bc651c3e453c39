"""``python -m services.prefill``"""

import asyncio

from services.prefill.config import PrefillSettings
from services.prefill.servicer import PrefillServicer
from services.prefill.worker import PrefillWorker
from starmesh.instance.instance import open_instance
from starmesh.process import run_service
from starmesh.types import Role
from starmesh.v1 import prefill_pb2, prefill_pb2_grpc


async def serve(settings: PrefillSettings, stop: asyncio.Event) -> None:
    """Serve until ``stop``, then drain within the grace period."""
    async with settings.open_metrics(Role.PREFILL.value) as metrics:
        instance = await open_instance(settings, Role.PREFILL, prefix_caching=settings.prefix_caching, metrics=metrics)
        worker = PrefillWorker(instance)
        instance.server.add(
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
            PrefillServicer(worker, instance.instance_id),
            prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name,
        )
        await instance.run(stop, deliver=worker.deliver, close=worker.close)


if __name__ == "__main__":
    run_service("prefill", PrefillSettings, serve)
