"""/openapi.json: FastAPI's description of the routes, with the bodies that ``body`` reads for itself."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from services.router.http.answers import ChatCompletionChunk, CompletionChunk
from services.router.http.chat_request import ChatRequest
from services.router.http.completion_request import CompletionRequest

_COMPONENTS: Final = "#/components/schemas/{model}"


def describe(app: FastAPI, *, needs_key: bool) -> None:
    """Replace the app's description."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _describe(app, needs_key=needs_key)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # as FastAPI's documentation has it


def _describe(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, definitions = models_json_schema(
        [
            (ChatRequest, "validation"),
            (CompletionRequest, "validation"),
            (ChatCompletionChunk, "serialization"),
            (CompletionChunk, "serialization"),
        ],
        ref_template=_COMPONENTS,
    )
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    if needs_key:
        components["securitySchemes"] = {"api_key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"api_key": []}]
    return schema
