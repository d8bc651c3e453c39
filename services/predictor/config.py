"""Settings of the predictor."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from starmesh.emulation.settings import EmulationSettings
from starmesh.telemetry.metrics import check_listen


class PredictorSettings(EmulationSettings):
    """What predicts, what is collected, what is shown."""

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
    metrics_listen: str = Field("", description="HOST:PORT of a page with metrics for Prometheus; empty: none")

    @field_validator("predictor_dir")
    @classmethod
    def _there(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError(f"there is no directory {path}")
        return path

    @field_validator("metrics_listen")
    @classmethod
    def _closed_to_the_network(cls, listen: str, info: ValidationInfo) -> str:
        if listen:
            check_listen(listen, allow_plaintext=bool(info.data.get("allow_plaintext")))
        return listen
