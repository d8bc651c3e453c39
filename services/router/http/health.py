"""GET /healthz: what load balancers ask, with the answer of ``grpc.health.v1``. Needs no key."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from services.router.http.parts import HttpParts


class Health(BaseModel):
    """Whether to send requests here."""

    status: Literal["serving", "not_serving"]


def health_routes(parts: HttpParts) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.head("/healthz", include_in_schema=False)
    @routes.get("/healthz", operation_id="get_health", responses={503: {"model": Health}})
    async def get_health(response: Response) -> Health:
        """Say whether new requests are taken: once a prefill and a decode instance have come, until the stop."""
        if parts.ready:
            return Health(status="serving")
        response.status_code = 503
        return Health(status="not_serving")

    return routes
