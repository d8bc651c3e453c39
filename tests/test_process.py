"""A service that is set up wrongly says so in one line, before it does anything."""

from __future__ import annotations

import asyncio

import pytest

from starmesh.process import ServiceSettings, run_service

pytestmark = pytest.mark.fast


async def _never(settings: ServiceSettings, stop: asyncio.Event) -> None:
    raise AssertionError("it served")


@pytest.mark.parametrize(
    ("flags", "environment", "named"),
    [
        (["--log-level", "loud"], {}, "--log-level"),
        (["--instance-id", "a b"], {}, "--instance-id"),
        (["--cluster", "{a}"], {}, "--cluster"),
        (["--listen", "0.0.0.0:0"], {}, "--advertise"),
        (["--report-interval-s", "soon"], {}, "--report-interval-s"),
        ([], {"STARMESH_GRACE_S": "-1"}, "--grace-s"),
        ([], {"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER"),
    ],
)
def test_bad_settings_are_one_line(
    flags: list[str],
    environment: dict[str, str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["service", *flags])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        run_service("decode", ServiceSettings, _never)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert "Value error" not in line
