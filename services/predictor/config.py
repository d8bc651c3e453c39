"""Settings of the predictor."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from starmesh.emulation.settings import EmulationSettings


class PredictorSettings(EmulationSettings):
    """What predicts, and what is collected."""

    predictor: str = Field(
        "",
        description="version or file to start with; empty: what ships for the model, else conditional_median",
    )
    longest_output_tokens: int = Field(
        32_768, ge=1, description="emulated: the longest output of the load, which the errors of predictions grow with"
    )
    predictor_dir: Path | None = Field(None, description="directory of predictor files that may be promoted")
    # At 25 tokens/s and a sample every 20: what 3,000 sequences send in a second.
    queue: int = Field(4096, ge=1, le=1 << 16, description="samples that may wait; beyond them the oldest is dropped")
    recalibrate: bool = Field(True, description="correct the quantiles by requests that have ended")
    collect: Path | None = Field(None, description="directory to store labelled samples in; none: nothing is stored")
    collect_max_mib: int = Field(1024, ge=1, description="MiB at which collecting ends")

    @field_validator("predictor_dir")
    @classmethod
    def _there(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError(f"there is no directory {path}")
        return path
