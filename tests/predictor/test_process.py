"""The service as an operator starts it: settings, registration, metrics, a clean stop, a restart."""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.predictor.config import PredictorSettings
from starmesh.ledger.redis import RedisLedger
from starmesh.prediction.shards import read_sequences
from starmesh.process import run_service
from starmesh.telemetry.registry import METRICS
from starmesh.types import Role
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc
from tests.mesh.processes import Mesh, Service
from tests.predictor.predictors import WAIT_S, end, request, sample


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    async with Mesh(tmp_path, Path()) as started:
        yield started


async def predict(mesh: Mesh, message: predictor_pb2.PredictRequest) -> predictor_pb2.PredictResponse:
    stub: predictor_pb2_grpc.PredictorServiceAsyncStub = predictor_pb2_grpc.PredictorServiceStub(mesh.channel("p0"))
    return await stub.Predict(message, timeout=WAIT_S)


async def stop(service: Service) -> None:
    service.terminate()
    async with asyncio.timeout(WAIT_S):
        assert await service.process.wait() == 0


async def test_it_registers_shows_metrics_and_goes_on_after_a_restart(mesh: Mesh, tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    flags = ("--metrics-listen", "127.0.0.1:0", "--collect", str(samples), "--queue", "4")
    service = await mesh.start("predictor", "p0", *flags)
    assert mesh.server is not None
    ledger = RedisLedger.connect(mesh.server.url, cluster="default")
    (view,) = (await ledger.view()).of_role(Role.PREDICTOR)
    await ledger.close()
    assert view.info.address == service.address
    # More than the queue holds, so that some are dropped.
    await predict(mesh, request([sample(f"r{number}", 0, number) for number in range(8)]))
    await predict(mesh, request([sample("a", 20)], [end("a", 40), end("r7", 30)]))
    page = await asyncio.to_thread(_scrape, service.log.read_text())
    for row in METRICS:
        if row.roles == (Role.PREDICTOR,):
            assert f"# TYPE {row.prometheus_name} {row.prometheus_type}\n" in page, f"{row.name} is not in\n{page}"
    mine = 'service_instance_id="p0"'
    assert f'starmesh_predictor_dropped_samples_total{{{mine},starmesh_reason="queue_full"}} 4.0' in page
    assert 'starmesh_version="conditional_median"} 1.0' in page
    assert f"starmesh_predictor_predictions_total{{{mine}}} 5.0" in page
    assert f'starmesh_predictor_coverage{{{mine},starmesh_progress="0-0.25"}} 1.0' in page
    await stop(service)
    assert {sequence.request_id for sequence in read_sequences(samples)} == {"a", "r7"}

    await mesh.start("predictor", "p0", *flags)
    response = await predict(mesh, request([sample("b", 0)], [end("b", 10)]))
    assert len(response.estimates) == 1
    await stop(mesh.services["p0"])
    assert {sequence.request_id for sequence in read_sequences(samples)} == {"a", "r7", "b"}


def _scrape(log: str) -> str:
    (url,) = {word for word in log.split() if word.startswith("http://")}
    with urllib.request.urlopen(url, timeout=WAIT_S) as page:
        text = page.read().decode()
        assert isinstance(text, str)
        return text


async def test_a_predictor_that_is_not_there_is_one_line(mesh: Mesh, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="there is no predictor 'mine'"):
        await mesh.start("predictor", "p0", "--predictor", "mine")
    assert "Traceback" not in (tmp_path / "p0.log").read_text()


async def _never(settings: PredictorSettings, stop: asyncio.Event) -> None:
    raise AssertionError("it served")


@pytest.mark.parametrize(
    "flags",
    [
        ("--predictor-dir", "/nowhere"),
        ("--queue", "0"),
        ("--collect-max-mib", "0"),
        ("--metrics-listen", "9464"),
        ("--metrics-listen", "127.0.0.1:99999"),
        ("--metrics-listen", "0.0.0.0:9464"),
    ],
)
def test_bad_settings_are_one_line(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["predictor", *flags])
    with pytest.raises(SystemExit) as caught:
        run_service("predictor", PredictorSettings, _never)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flags[0] in line


def test_metrics_beyond_loopback_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--metrics-listen", "0.0.0.0:9464", "--allow-plaintext"]
    monkeypatch.setattr(sys, "argv", ["predictor", *flags])
    assert PredictorSettings().metrics_listen == "0.0.0.0:9464"
