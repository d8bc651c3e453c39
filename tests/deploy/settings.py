"""Which settings services take, and what they make of a container's command and environment. Reads the services' own
settings, so that what deploy/ sets cannot go astray."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from services.decode.config import DecodeSettings
from services.predictor.config import PredictorSettings
from services.prefill.config import PrefillSettings
from services.rescheduler.config import ReschedulerSettings
from services.router.config import RouterSettings
from starmesh.process import ServiceSettings

SETTINGS: Final[dict[str, type[ServiceSettings]]] = {
    "router": RouterSettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
    "rescheduler": ReschedulerSettings,
    "predictor": PredictorSettings,
}
PREFIX: Final = "STARMESH_"
ELSEWHERE: Final = {
    # Read by what fetches models, not by a service's settings.
    "STARMESH_OFFLINE",
    "STARMESH_HOME",
}
FILES: Final = ("tls_cert", "tls_key", "tls_ca", "ledger_ca", "ledger_password_file", "api_keys", "predictor_dir")
"""Settings that name what a secret or a volume has."""


def unknown_variables(names: set[str], roles: set[str]) -> set[str]:
    """Those of ``names`` that begin as settings do and are a setting of none of ``roles``."""
    known = {PREFIX + name.upper() for role in roles for name in SETTINGS[role].model_fields}
    return {name for name in names if name.startswith(PREFIX)} - known - ELSEWHERE


def take(
    role: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, directory: Path, *flags: str
) -> ServiceSettings:
    """What the service makes of its environment; paths of secrets and volumes become ``directory``. Raises
    pydantic's ValidationError for what it would not start with."""
    for name, value in environment.items():
        is_file = name.removeprefix(PREFIX).lower() in FILES and value
        monkeypatch.setenv(name, str(directory) if is_file else value)
    return SETTINGS[role](_cli_parse_args=list(flags))  # type: ignore[call-arg]
