"""What is shown of the predictor, by ``starmesh predictor status`` and ``starmesh status``."""

from __future__ import annotations

import asyncio
import io
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest
from rich.console import Console, RenderableType

from starmesh.cli.predictor_status import describe, look_at_predictor, predictor_line, predictor_view
from starmesh.cli.status import PredictorLook, prediction_table, sequence_table
from starmesh.v1 import cluster_pb2, predictor_pb2

pytestmark = pytest.mark.fast


def text_of(what: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def state(**fields: int) -> cluster_pb2.GetClusterPredictorResponse:
    status = predictor_pb2.PredictorStatus(**fields)  # type: ignore[arg-type]
    status.version, status.kind, status.parameters = "mine-2", "starmesh", 1_234_567
    status.versions.extend(["mine-1", "mine-2"])
    status.latency.FromMicroseconds(2_500)
    for number, (mae, coverage) in enumerate([(210.4, 0.86), (80.0, 0.91), (0.0, 0.0), (12.5, 1.0)]):
        quality = status.qualities.add(progress_from=number / 4, progress_to=(number + 1) / 4)
        if mae:
            quality.estimates, quality.mae_tokens, quality.coverage = 10 + number, mae, coverage
    return cluster_pb2.GetClusterPredictorResponse(instance_id="predictor-0", status=status)


def test_the_view_has_facts_and_the_error_by_progress() -> None:
    shown = text_of(predictor_view(state(predictions=99, dropped_samples=1, ended_sequences=7)))
    assert "mine-2 (starmesh, 1.23 M parameters)" in shown
    assert "mine-1, mine-2" in shown
    assert "99, 1 sample dropped" in shown
    assert "2.5 ms" in shown
    rows = {line.split("%")[0].strip(): line.split("%")[1].split() for line in shown.splitlines() if " %" in line}
    assert rows["0-25"] == ["10", "210.4", "86.0"]
    assert rows["50-75"] == ["0", "-", "-"]
    assert "nothing" in shown  # collected
    assert "3 samples, 2.0 MiB" in text_of(predictor_view(state(collected_samples=3, collected_bytes=2 << 20)))


def test_a_predictor_that_has_scored_nothing_says_what_that_takes() -> None:
    response = cluster_pb2.GetClusterPredictorResponse(instance_id="predictor-0")
    assert "requests that end by themselves" in text_of(predictor_view(response))
    assert text_of(predictor_line(response)) == "predictor: nothing yet\n"
    response.status.qualities.add(progress_to=1.0)  # a part without estimates
    assert "requests that end by themselves" in text_of(predictor_view(response))
    assert text_of(predictor_line(response)) == "predictor: nothing yet\n"


def test_one_line_shows_how_predictions_tighten() -> None:
    assert text_of(predictor_line(state())) == "predictor: mine-2; mean error by progress: 210, 80, -, 12 tokens\n"


@pytest.mark.parametrize(
    ("parameters", "shown"),
    [(0, "v (mlp)"), (999, "v (mlp, 999 parameters)"), (8_423_000, "v (mlp, 8.42 M parameters)")],
)
def test_a_size_is_told_in_three_figures(parameters: int, shown: str) -> None:
    assert describe(predictor_pb2.PredictorStatus(version="v", kind="mlp", parameters=parameters)) == shown


def test_a_predictor_named_for_its_kind_says_it_once() -> None:
    assert describe(predictor_pb2.PredictorStatus(version="mlp", kind="mlp", parameters=1)) == "mlp (1 parameter)"
    assert describe(predictor_pb2.PredictorStatus(version="mlp", kind="mlp")) == "mlp"


def watched(*ages: int | None) -> cluster_pb2.WatchClusterResponse:
    response = cluster_pb2.WatchClusterResponse()
    response.instances.add(instance_id="predictor-0", role=cluster_pb2.ROLE_PREDICTOR)
    decode = response.instances.add(instance_id="decode-0", role=cluster_pb2.ROLE_DECODE)
    response.instances.add(instance_id="decode-1", role=cluster_pb2.ROLE_DECODE)
    for number, age in enumerate(ages):
        sequence = decode.load.sequences.add(request_id=f"r{number}", epoch=1, resident_tokens=100)
        if age is not None:
            sequence.remaining_tokens = 50
            sequence.remaining_tokens_upper = 90
            sequence.prediction_age_tokens = age
    return response


def test_predicted_tokens_are_those_of_now_and_those_to_come() -> None:
    table = prediction_table(watched(3, 200, 201, None))
    assert table is not None
    rows = [line.split() for line in text_of(table).splitlines()[1:]]
    assert rows == [["decode-0", "400", "550", "4", "2"], ["decode-1", "0", "0", "0", "0"]]


def test_without_an_estimate_nothing_is_said_of_predictions() -> None:
    assert prediction_table(watched(None, None)) is None


def test_a_sequence_shows_its_estimate_with_age_or_that_there_is_none() -> None:
    rows = [line.split()[-4:] for line in text_of(sequence_table(watched(7, None)), width=120).splitlines()[1:]]
    assert rows == [["100", "50", "90", "7"], ["0", "0", "100", "unknown"]]


def test_the_id_of_a_request_is_whole_in_80_columns() -> None:
    response = watched(7)
    name = "0123456789abcdef" * 2
    response.instances[1].load.sequences[0].request_id = name
    table = text_of(sequence_table(response))
    assert "…" not in table
    assert "".join(line[:16].split()[0] for line in table.splitlines()[1:]).startswith(name[:8])
    assert name in text_of(sequence_table(response), width=120)


def failing(code: grpc.StatusCode) -> SimpleNamespace:
    async def get(_: cluster_pb2.GetClusterPredictorRequest, *, timeout: float) -> None:
        raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())

    return SimpleNamespace(cluster=SimpleNamespace(GetClusterPredictor=get))


@pytest.mark.parametrize(
    "code",
    [
        *(grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE),
        *(grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_predictor_that_is_not_there_leaves_its_line_out(code: grpc.StatusCode) -> None:
    router = failing(code)
    assert await look_at_predictor(router) is None  # type: ignore[arg-type]
    assert await PredictorLook(router).line(watched()) is None  # type: ignore[arg-type]


async def test_what_fails_otherwise_is_told() -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await look_at_predictor(failing(grpc.StatusCode.INTERNAL))  # type: ignore[arg-type]


async def test_the_predictor_is_not_asked_at_each_look() -> None:
    asked = 0

    async def get(
        _: cluster_pb2.GetClusterPredictorRequest, *, timeout: float
    ) -> cluster_pb2.GetClusterPredictorResponse:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return state()

    look = PredictorLook(SimpleNamespace(cluster=SimpleNamespace(GetClusterPredictor=get)))  # type: ignore[arg-type]
    assert await look.line(cluster_pb2.WatchClusterResponse()) is None  # no predictor: nobody is asked
    assert asked == 0
    lines = [await look.line(watched()) for _ in range(3)]
    assert asked == 1
    assert all(line is not None and "mine-2" in line.plain for line in lines)
