"""The application: all routes, and what goes around them."""

from __future__ import annotations

import importlib.metadata

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from services.router.http.caller import Door
from services.router.http.errors import InternalErrors, answer_in_openai_shape
from services.router.http.generation import generation_routes
from services.router.http.health import health_routes
from services.router.http.hosts import LoopbackNames
from services.router.http.live import live_routes
from services.router.http.models import model_routes
from services.router.http.openapi import describe
from services.router.http.parts import HttpParts

_DESCRIPTION = "What OpenAI's clients call, on a starmesh cluster. docs/openai.md says what each field does here."


def create_app(parts: HttpParts, *, loopback: bool) -> FastAPI:
    """The app of one router. ``loopback`` says that it is served on a loopback address only."""
    settings = parts.settings
    middleware = [Middleware(InternalErrors)]
    if loopback and parts.keys is None:
        middleware.append(Middleware(LoopbackNames, refused=parts.metrics.refused_call))
    if origins := [origin.strip() for origin in settings.http_allow_origins.split(",") if origin.strip()]:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # OpenAI's clients send a dozen of their own
                expose_headers=["x-request-id", "retry-after", "retry-after-ms"],
                max_age=600,
            )
        )
    app = FastAPI(
        title="starmesh",
        version=importlib.metadata.version("starmesh"),
        description=_DESCRIPTION,
        # Both pages load their scripts from a network of somebody else's.
        docs_url="/docs" if settings.http_docs else None,
        redoc_url=None,
        middleware=middleware,
        redirect_slashes=False,
        # FastAPI would make spans, metrics and logs of its own: a second trace for each request, beside the router's.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    answer_in_openai_shape(app, refused=parts.metrics.refused_call)
    door = Door(parts.keys)
    app.include_router(generation_routes(parts, door))
    app.include_router(model_routes(parts, door))
    app.include_router(health_routes(parts))
    app.include_router(live_routes(parts.frames, parts.keys))
    describe(app, needs_key=parts.keys is not None)
    return app
