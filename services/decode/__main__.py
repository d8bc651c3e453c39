"""``python -m services.decode``"""

import asyncio

from services.decode.config import DecodeSettings
from services.decode.evacuation import Evacuator
from services.decode.servicer import DecodeServicer
from services.decode.worker import DecodeWorker
from starmesh.instance.instance import open_instance
from starmesh.process import run_service
from starmesh.types import Role
from starmesh.v1 import decode_pb2, decode_pb2_grpc


async def serve(settings: DecodeSettings, stop: asyncio.Event) -> None:
    """Serve until ``stop``, then drain within the grace period."""
    async with settings.open_metrics(Role.DECODE.value) as metrics:
        instance = await open_instance(settings, Role.DECODE, prefix_caching=False, metrics=metrics)
        worker = DecodeWorker(instance, settings.migrator, settings.predictor)
        instance.on_load = Evacuator(instance, worker.migrator, settings.evacuation).look
        instance.server.add(
            decode_pb2_grpc.add_DecodeServiceServicer_to_server,
            DecodeServicer(worker, max_timeout_s=settings.max_timeout_s),
            decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name,
        )
        await instance.run(stop, deliver=worker.deliver, close=worker.close)


if __name__ == "__main__":
    run_service("decode", DecodeSettings, serve)
