"""Settings of a router."""

from pathlib import Path

from pydantic import Field, ValidationInfo, field_validator

from starmesh.emulation.settings import EmulationSettings
from starmesh.ledger.limits import OWNER_TTL_S
from starmesh.lengths import LENGTH_MODELS
from starmesh.model_files import DEFAULT_MODEL
from starmesh.policy.dispatch import POLICIES
from starmesh.telemetry.metrics import check_listen


class RouterSettings(EmulationSettings):
    """What a router needs on top of any service."""

    model: str = Field(DEFAULT_MODEL, description="directory, hub id or name of the model, for its tokenizer")
    output_lengths: str = Field(
        "chat", description=f"emulated: how long the answers to ordinary prompts are: {', '.join(LENGTH_MODELS)}"
    )
    api_keys: Path | None = Field(
        None, description="file of API keys, made with `starmesh keys`; every public call needs one of them then"
    )
    http_listen: str = Field("", description="HOST:PORT of OpenAI's HTTP API and of the live page; empty: neither")
    http_allow_origins: str = Field(
        "", description="origins of web pages that may call it, as https://chat.example.org,...; *: any; empty: none"
    )
    http_docs: bool = Field(False, description="serve a page to try it at /docs; a browser loads it from a CDN")
    dispatch_policy: str = Field("least_tokens", description=f"how decode instances are chosen: {', '.join(POLICIES)}")
    predictor_timeout_s: float = Field(
        0.1, gt=0, le=10, description="seconds that dispatch by predicted_load waits for a prompt's prediction"
    )
    view_interval_s: float = Field(0.2, gt=0.01, description="seconds between looks at the ledger")
    max_requests: int = Field(8192, ge=1, description="requests in flight, waiting ones included; more are refused")
    max_detached_requests: int = Field(
        1024, ge=0, description="requests that go on while their client is away, to be resumed; more end the oldest"
    )
    max_kept_tokens: int = Field(
        1_000_000, ge=0, description="tokens of complete answers kept to be resumed, each token some 40 bytes"
    )
    max_stream_requests: int = Field(1024, ge=1, description="requests in flight on one GenerateMany stream")
    queue_length: int = Field(1024, ge=1, description="requests that may wait for an instance with room")
    queue_timeout_s: float = Field(30.0, gt=0, description="seconds that a request waits for room, at most")
    absent_timeout_s: float = Field(2.0, ge=0, description="seconds that a request waits for any instance to be up")
    # A reasoning answer of 32,768 tokens takes 16 minutes at 30 ms a token.
    max_duration_s: float = Field(3600.0, gt=0, description="seconds that a request without a deadline may take")
    max_recoveries: int = Field(8, ge=0, description="times that a request is begun again after failures")
    reserve_output_tokens: int = Field(
        256, ge=1, description="output tokens to reserve room for at dispatch; a longer answer grows into what is free"
    )
    reservation_ttl_s: float = Field(30.0, gt=1, description="seconds that a reservation of a dead router lives on")
    owner_ttl_s: float = Field(
        OWNER_TTL_S, gt=1, description="seconds that the ownership entries of a dead router live on"
    )

    @field_validator("api_keys", mode="before")
    @classmethod
    def _empty_is_no_keys(cls, value: object) -> object:
        return value or None

    @field_validator("http_listen")
    @classmethod
    def _http_closed_to_the_network(cls, value: str, info: ValidationInfo) -> str:
        if value:
            encrypted = info.data.get("tls_cert") is not None
            check_listen(value, allow_plaintext=encrypted or bool(info.data.get("allow_plaintext")))
        return value

    @field_validator("dispatch_policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        if name not in POLICIES:
            raise ValueError(f"there is no policy {name!r}: use one of {', '.join(POLICIES)}")
        return name

    @field_validator("output_lengths")
    @classmethod
    def _known_lengths(cls, name: str) -> str:
        if name not in LENGTH_MODELS:
            raise ValueError(f"there is no length model {name!r}: use one of {', '.join(LENGTH_MODELS)}")
        return name
