"""GET /v1/models and /v1/models/{id}: the one model that is served."""

# No postponed annotations: FastAPI could not see the door in them, which is a local name.

from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field

from services.router.http.caller import Caller, Door
from services.router.http.errors import ErrorBody, invalid
from services.router.http.parts import HttpParts


class Model(BaseModel):
    """A model that requests may name."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When this router started, in seconds since 1970.")
    owned_by: Literal["starmesh"] = "starmesh"
    max_model_len: int = Field(description="Limits prompt and answer together, in tokens. Not OpenAI's, but vLLM's.")


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[Model]


def model_routes(parts: HttpParts, door: Door) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/models")

    def served() -> Model:
        facts = parts.model.facts(parts.watch.view)
        return Model(id=facts.name, created=parts.started_at_s, max_model_len=facts.context_tokens)

    @routes.get("", operation_id="list_models")
    async def list_models(caller: Annotated[Caller, Depends(door)]) -> ModelList:
        """List the served model."""
        return ModelList(data=[served()])

    @routes.get("/{model_id:path}", operation_id="retrieve_model", responses={404: {"model": ErrorBody}})
    async def retrieve_model(model_id: str, caller: Annotated[Caller, Depends(door)]) -> Model:
        """Describe the served model."""
        model = served()
        if model_id != model.id:
            raise invalid("model", f"is not served here; {model.id!r} is", "model_not_found", status=404)
        return model

    return routes
