"""``starmesh predictor status`` and ``promote``: which predictor answers and how well it does, and another one instead.

Owns what is shown of a predictor's state, here and in ``starmesh status`` and ``starmesh up``. Owns no measuring: the
predictor counts and scores.
"""

from __future__ import annotations

import json

import grpc
import grpc.aio
from google.protobuf.json_format import MessageToDict
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from starmesh.cli.router import CALL_TIMEOUT_S, RouterClient
from starmesh.cli.run import CliError
from starmesh.prediction.batch import UPPER_QUANTILE
from starmesh.rpc.status import from_rpc_error
from starmesh.v1 import cluster_pb2, predictor_pb2

_LOOK_TIMEOUT_S = 1.0
_FIELD = "version: "


async def show_predictor(router: RouterClient, console: Console) -> None:
    """Print the state. Raises AioRpcError when there is none, or none that answers."""
    response = await router.cluster.GetClusterPredictor(
        cluster_pb2.GetClusterPredictorRequest(), timeout=CALL_TIMEOUT_S
    )
    console.print(predictor_view(response))


async def predictor_json(router: RouterClient) -> str:
    """The state as JSON, fields as in the protocol. Raises AioRpcError as ``show_predictor``."""
    response = await router.cluster.GetClusterPredictor(
        cluster_pb2.GetClusterPredictorRequest(), timeout=CALL_TIMEOUT_S
    )
    content = MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(content, indent=2)


async def promote(router: RouterClient, version: str, console: Console) -> None:
    """Have ``version`` answer from now on. Raises CliError for a version that is not there, AioRpcError when the
    predictor is not, or does not take the version."""
    try:
        response = await router.cluster.PromoteClusterPredictor(
            cluster_pb2.PromoteClusterPredictorRequest(version=version), timeout=CALL_TIMEOUT_S
        )
    except grpc.aio.AioRpcError as error:
        status = from_rpc_error(error)
        if status.message.startswith(_FIELD):
            raise CliError(f"version {version} {status.message.removeprefix(_FIELD)}") from None
        raise
    console.print(f"{response.instance_id} answers with {describe(response.status)}", highlight=False, markup=False)


async def look_at_predictor(router: RouterClient) -> cluster_pb2.GetClusterPredictorResponse | None:
    """The state for a view that has more to show; None when there is no predictor or it does not answer at once."""
    try:
        return await router.cluster.GetClusterPredictor(
            cluster_pb2.GetClusterPredictorRequest(), timeout=_LOOK_TIMEOUT_S
        )
    except grpc.aio.AioRpcError as error:
        # UNIMPLEMENTED: a router older than this command. RESOURCE_EXHAUSTED: the view itself uses up its key's limits.
        absent = (
            *(grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED),
            *(grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED),
        )
        if error.code() in absent:
            return None
        raise


def describe(status: predictor_pb2.PredictorStatus) -> str:
    """Version, kind and size in a few words."""
    facts = [] if status.kind in ("", status.version) else [status.kind]
    if status.parameters:
        facts.append(f"{_count(status.parameters)} parameter{'s' * (status.parameters != 1)}")
    return (status.version or "nothing yet") + (f" ({', '.join(facts)})" if facts else "")


def predictor_line(response: cluster_pb2.GetClusterPredictorResponse) -> Text:
    """One line: which predictor answers, and how its error falls as sequences progress."""
    qualities = response.status.qualities
    line = f"predictor: {response.status.version or 'nothing yet'}"
    if any(quality.estimates for quality in qualities):
        errors = ", ".join(f"{quality.mae_tokens:.0f}" if quality.estimates else "-" for quality in qualities)
        line += f"; mean error by progress: {errors} tokens"
    return Text(line)


def predictor_view(response: cluster_pb2.GetClusterPredictorResponse) -> RenderableType:
    """All of the state: facts a line each, then the table by progress."""
    status = response.status
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("instance", response.instance_id)
    facts.add_row("answers with", describe(status))
    if status.HasField("layout"):
        layers = ", ".join(map(str, status.layout.layers))
        facts.add_row("takes", f"layers {layers} of width {status.layout.width}, model {status.layout.model_revision}")
    facts.add_row("may be promoted", ", ".join(status.versions) or "no other")
    facts.add_row("predictions", f"{status.predictions}, {_samples(status.dropped_samples)} dropped")
    latency_ms = status.latency.seconds * 1e3 + status.latency.nanos / 1e6
    facts.add_row("latency", f"{latency_ms:.1f} ms from a sample's arrival to its answer")
    facts.add_row("ended sequences", f"{status.ended_sequences} scored")
    collected = f"{_samples(status.collected_samples)}, {status.collected_bytes / 2**20:.1f} MiB"
    facts.add_row("collected", collected if status.collected_samples else "nothing")
    return Group(facts, Text(), _quality_table(status))


def _quality_table(status: predictor_pb2.PredictorStatus) -> RenderableType:
    if not any(quality.estimates for quality in status.qualities):
        return Text("no estimate has been scored yet: that takes requests that end by themselves")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("progress", no_wrap=True)
    for heading in ("estimates", "mean error, tokens", f"within the {UPPER_QUANTILE} quantile"):
        table.add_column(heading, justify="right", no_wrap=True)
    for quality in status.qualities:
        scored = bool(quality.estimates)
        table.add_row(
            _part(quality),
            str(quality.estimates),
            f"{quality.mae_tokens:.1f}" if scored else "-",
            f"{quality.coverage:.1%}" if scored else "-",
        )
    return table


def _part(quality: predictor_pb2.PredictionQuality) -> str:
    return f"{quality.progress_from * 100:.0f}-{quality.progress_to * 100:.0f} %"


def _samples(count: int) -> str:
    return f"{count} sample{'s' * (count != 1)}"


def _count(number: int) -> str:
    """Three figures are enough of a number of parameters."""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
