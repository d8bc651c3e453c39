"""``starmesh status``: the cluster's instances as a table."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import TypeVar

from google.protobuf.json_format import MessageToDict
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from starmesh.cli.predictor_status import look_at_predictor, predictor_line
from starmesh.cli.router import CALL_TIMEOUT_S, RouterClient
from starmesh.cli.run import CliError
from starmesh.policy.rescheduling.config import ReschedulingConfig
from starmesh.v1 import cluster_pb2

_STATE_STYLES = {"ready": "green", "draining": "yellow", "drained": "dim"}
_STALE_S = 2.0
_RATE_INTERVAL_S = 0.5
_LOOK_INTERVAL_S = 2.0
_FRESH_TOKENS = ReschedulingConfig().max_prediction_age_tokens
"""What rescheduling still believes."""

Frame = TypeVar("Frame")


class TokenRates:
    """Output tokens per second of each instance, between one observation of the cluster and the next."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, int]] = {}
        self._rates: dict[str, float] = {}

    def observe(self, response: cluster_pb2.WatchClusterResponse) -> dict[str, float]:
        """The rates by instance id; an instance seen for the first time, or started anew, has none."""
        now_s = response.observe_time.seconds + response.observe_time.nanos / 1e9
        rates = {}
        seen = {}
        for instance in response.instances:
            name, tokens = instance.instance_id, instance.load.output_tokens
            # The report's own time: between two reports nothing changes, which is no rate of zero.
            at_s = now_s - _age_s(instance)
            last = self._last.get(name)
            if last is not None and at_s - last[0] < _RATE_INTERVAL_S / 2:
                seen[name] = last
                if name in self._rates:
                    rates[name] = self._rates[name]
                continue
            seen[name] = (at_s, tokens)
            if last is not None and tokens >= last[1]:
                rates[name] = (tokens - last[1]) / (at_s - last[0])
        self._last, self._rates = seen, rates
        return rates


class PredictorLook:
    """The line on the predictor, asked for no oftener than it changes much."""

    def __init__(self, router: RouterClient) -> None:
        self._router = router
        self._line: Text | None = None
        self._next_s = 0.0

    async def line(self, response: cluster_pb2.WatchClusterResponse) -> Text | None:
        """None when the cluster has no predictor, or one that does not answer."""
        if not any(instance.role == cluster_pb2.ROLE_PREDICTOR for instance in response.instances):
            return None
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._next_s:
            state = await look_at_predictor(self._router)
            self._line = None if state is None else predictor_line(state)
            self._next_s = asyncio.get_running_loop().time() + _LOOK_INTERVAL_S
        return self._line


def cluster_table(response: cluster_pb2.WatchClusterResponse, rates: dict[str, float]) -> RenderableType:
    """The instances, a line each, and a line on the router's requests."""
    # 80 columns hold it: no role, which is in the name of an instance unless an operator chose another.
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for heading in ("instance", "state", "address"):
        table.add_column(heading, no_wrap=True)
    for heading in ("KV", "resident", "run", "wait", "tokens/s", "step ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for instance in response.instances:
        table.add_row(*_cells(instance, rates))
    active = response.active_requests
    lines = [Text(f"{active} request{'s' * (active != 1)} active, {response.queued_requests} queued")]
    if (balance := balance_line(response)) is not None:
        lines.append(balance)
    if not response.ledger_available:
        lines.append(Text("the ledger does not answer: the table is as last seen", style="red"))
    return Group(table, *lines)


def sequence_table(response: cluster_pb2.WatchClusterResponse) -> RenderableType:
    """The sequences of the decode instances, a line each."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    # Folded where the terminal is narrow: half an id names no request.
    table.add_column("request", overflow="fold")
    table.add_column("instance", no_wrap=True)
    for heading in ("epoch", "prompt", "output", "limit", "resident", "remaining", "upper", "age"):
        table.add_column(heading, justify="right", no_wrap=True)
    newest: dict[str, int] = {}
    decoding = [instance for instance in response.instances if instance.role == cluster_pb2.ROLE_DECODE]
    for instance in decoding:
        for sequence in instance.load.sequences:
            newest[sequence.request_id] = max(sequence.epoch, newest.get(sequence.request_id, 0))
    for instance in decoding:
        for sequence in instance.load.sequences:
            # A lost instance's last report still lists what has gone on elsewhere since.
            if sequence.epoch < newest[sequence.request_id]:
                continue
            counts = (sequence.epoch, sequence.prompt_tokens, sequence.output_tokens, sequence.max_output_tokens)
            estimate: tuple[int | str, ...] = ("unknown",)
            if sequence.HasField("remaining_tokens"):
                estimate = (
                    *(sequence.remaining_tokens, sequence.remaining_tokens_upper),
                    sequence.prediction_age_tokens,
                )
            cells = (*counts, sequence.resident_tokens, *estimate)
            table.add_row(sequence.request_id, instance.instance_id, *map(str, cells))
    return table


def prediction_table(response: cluster_pb2.WatchClusterResponse) -> RenderableType | None:
    """What the decode instances hold now and will have held at their sequences' ends, a line each; None when no
    sequence has an estimate. A sequence without one counts as it is."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("instance", no_wrap=True)
    for heading in ("resident", "predicted", "sequences", "with a fresh estimate"):
        table.add_column(heading, justify="right", no_wrap=True)
    predicted = False
    for instance in response.instances:
        if instance.role != cluster_pb2.ROLE_DECODE:
            continue
        sequences = instance.load.sequences
        known = [sequence for sequence in sequences if sequence.HasField("remaining_tokens")]
        predicted = predicted or bool(known)
        resident = sum(sequence.resident_tokens for sequence in sequences)
        remaining = sum(sequence.remaining_tokens for sequence in known)
        fresh = sum(sequence.prediction_age_tokens <= _FRESH_TOKENS for sequence in known)
        cells = (resident, resident + remaining, len(sequences), fresh)
        table.add_row(instance.instance_id, *map(str, cells))
    return table if predicted else None


def spread(tokens: Sequence[int]) -> float:
    """Root mean square of the distance from the mean: the measure that rescheduling brings down. 0 for none."""
    if not tokens:
        return 0.0
    mean = sum(tokens) / len(tokens)
    return math.sqrt(sum((count - mean) ** 2 for count in tokens) / len(tokens))


def balance_line(response: cluster_pb2.WatchClusterResponse) -> Text | None:
    """How evenly the decode instances are loaded; None where there is nothing to be even."""
    loads = [instance.load for instance in response.instances if _takes_part(instance)]
    if len(loads) < 2:
        return None
    resident = [load.resident_tokens for load in loads]
    moved, moving = sum(load.migrated_sequences for load in loads), sum(load.outgoing_migrations for load in loads)
    return Text(
        f"resident tokens: {sum(resident) / len(resident):.0f} on average, spread {spread(resident):.0f}; "
        f"{moved} came by moves, {moving} on the way"
    )


def name_of(instance: cluster_pb2.Instance) -> str:
    """Its id, and its role where the id does not begin with it."""
    role, name = cluster_pb2.Role.Name(instance.role).removeprefix("ROLE_").lower(), instance.instance_id
    return name if name.startswith(role) else f"{name} ({role})"


def state_of(instance: cluster_pb2.Instance) -> Text:
    """Its state, or for how long it has been silent."""
    age_s = _age_s(instance)
    if age_s > _STALE_S:
        return Text(f"silent {age_s:.0f} s", style="red")
    state = cluster_pb2.InstanceState.Name(instance.state).removeprefix("INSTANCE_STATE_").lower()
    return Text(state, style=_STATE_STYLES.get(state, ""))


def _takes_part(instance: cluster_pb2.Instance) -> bool:
    """Whether it could be balanced with others."""
    ready = instance.state == cluster_pb2.INSTANCE_STATE_READY and _age_s(instance) <= _STALE_S
    return instance.role == cluster_pb2.ROLE_DECODE and ready and instance.HasField("load")


def _age_s(instance: cluster_pb2.Instance) -> float:
    return instance.report_age.seconds + instance.report_age.nanos / 1e9


async def observe(
    router: RouterClient, *, interval_s: float, sequences: bool = False
) -> AsyncGenerator[RenderableType, None]:
    """The tables, again and again; ends with the router's stream. Raises AioRpcError when that breaks."""
    request = cluster_pb2.WatchClusterRequest()
    request.interval.FromNanoseconds(int(interval_s * 1e9))
    rates = TokenRates()
    look = PredictorLook(router)
    # A stream that is meant to last has no deadline; keepalive notices a router that has gone.
    call = router.cluster.WatchCluster(request)
    try:
        async for response in call:
            parts = [cluster_table(response, rates.observe(response))]
            if (line := await look.line(response)) is not None:
                parts.append(line)
            if (predictions := prediction_table(response)) is not None:
                parts += ["", predictions]
            if sequences:
                parts += ["", sequence_table(response)]
            yield Group(*parts)
    finally:
        call.cancel()


async def second(frames: AsyncGenerator[Frame, None]) -> Frame:
    """The second of the frames, then no more of them: a rate needs two observations. Raises CliError when it does not
    come."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S), contextlib.aclosing(frames):
            await anext(frames)
            return await anext(frames)
    except TimeoutError:
        raise CliError(f"no answer within {CALL_TIMEOUT_S:g} s; does --address name a router?") from None
    except StopAsyncIteration:
        raise CliError("the router is stopping; try again later, or name another with --address") from None


async def show_status(router: RouterClient, console: Console, *, sequences: bool = False) -> None:
    """Print the table once. Raises CliError for a router that does not answer or is stopping."""
    console.print(await second(observe(router, interval_s=_RATE_INTERVAL_S, sequences=sequences)))


async def watch_status(router: RouterClient, console: Console, *, interval_s: float, sequences: bool) -> None:
    """Show the table until Ctrl-C: in place on a terminal, one after another elsewhere."""
    if not console.is_terminal:
        async for table in observe(router, interval_s=interval_s, sequences=sequences):
            console.print(table)
        return
    with Live(console=console, auto_refresh=False) as live:
        async for table in observe(router, interval_s=interval_s, sequences=sequences):
            live.update(table, refresh=True)


async def status_json(router: RouterClient) -> str:
    """The instances as JSON, fields as in the protocol."""
    response = await router.cluster.ListInstances(cluster_pb2.ListInstancesRequest(), timeout=CALL_TIMEOUT_S)
    content = MessageToDict(response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return json.dumps(content, indent=2)


def _cells(instance: cluster_pb2.Instance, rates: dict[str, float]) -> Iterable[str | Text]:
    load = instance.load
    yield name_of(instance)
    yield state_of(instance)
    yield instance.address
    if not load.total_blocks:
        return
    yield f"{1 - load.free_blocks / load.total_blocks:.0%}"
    yield str(load.resident_tokens)
    yield str(load.running_sequences)
    yield str(load.waiting_sequences)
    rate = rates.get(instance.instance_id)
    yield "" if rate is None else f"{rate:.1f}"
    yield f"{(load.step_duration.seconds * 1e3 + load.step_duration.nanos / 1e6):.0f}"
