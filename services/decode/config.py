"""Settings of a decode instance."""

from pydantic import Field

from starmesh.instance.settings import EngineSettings


class DecodeSettings(EngineSettings):
    """An engine instance without a prefix cache: its prompts come with their KV."""

    max_timeout_s: float = Field(3600.0, gt=0, description="longest time that a sequence may run")
