"""Settings of a prefill instance."""

from pydantic import Field

from starmesh.instance.settings import EngineSettings


class PrefillSettings(EngineSettings):
    """An engine instance that keeps full KV blocks for prompts that begin alike."""

    prefix_caching: bool = Field(True, description="reuse the KV of prompts that begin with the same tokens")
