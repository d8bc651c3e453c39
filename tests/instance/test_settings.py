"""Settings of an engine instance that need no engine."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from starmesh.instance.hidden_state import pack_hidden_state
from starmesh.instance.settings import EngineSettings

pytestmark = pytest.mark.fast


def settings(*flags: str) -> EngineSettings:
    return EngineSettings(_cli_parse_args=list(flags))


@pytest.mark.parametrize(
    ("flag", "layers"), [("", None), ("none", ()), ("30", (30,)), ("15,30", (15, 30)), ("3,1", (3, 1))]
)
def test_hidden_layers(flag: str, layers: tuple[int, ...] | None) -> None:
    assert settings("--hidden-layers", flag).kept_layers == layers


@pytest.mark.parametrize("flag", ["last", "1,", "-1", "1.5", "1 2", "all,none", "²"])
def test_hidden_layers_that_are_no_numbers_are_refused(flag: str) -> None:
    with pytest.raises(ValidationError, match="give numbers of layers as in 15,30, or none"):
        settings(f"--hidden-layers={flag}")


def test_a_hidden_state_travels_as_little_endian_float16_and_is_clipped() -> None:
    packed = pack_hidden_state(np.array([[1.0, -2.5], [1e9, -np.inf]], dtype=np.float32))
    assert packed == np.array([1.0, -2.5, 65504.0, -65504.0], dtype="<f2").tobytes()
