"""What a router sees of its clients' requests: the latencies that SLOs are about, outcomes, the queue."""

from __future__ import annotations

from typing import Final

from starmesh.telemetry import names
from starmesh.telemetry.registry.metric import GAPS_S, TOKENS, WAITS_S, Kind, Metric
from starmesh.types import Role

_ROLES: Final = (Role.ROUTER,)
_MODEL: Final = (names.OPERATION, names.PROVIDER, names.MODEL)

REQUEST_DURATION = Metric(
    name="gen_ai.server.request.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="From the receipt of a request to its end; error.type is the status of one that failed.",
    roles=_ROLES,
    attributes=(*_MODEL, names.ERROR_TYPE),
    buckets=WAITS_S,
)
TIME_TO_FIRST_TOKEN = Metric(
    name="gen_ai.server.time_to_first_token",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="TTFT: from the receipt of a request to its first token.",
    roles=_ROLES,
    attributes=_MODEL,
    buckets=WAITS_S,
)
TIME_PER_OUTPUT_TOKEN = Metric(
    name="gen_ai.server.time_per_output_token",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="TPOT: of each request that ended well, the mean time between its tokens after the first.",
    roles=_ROLES,
    attributes=_MODEL,
    buckets=GAPS_S,
)
INTER_TOKEN_LATENCY = Metric(
    name="starmesh.inter_token_latency",
    kind=Kind.OBSERVED_HISTOGRAM,
    unit="s",
    description="ITL: each gap between tokens of a request; tokens that arrive together end one gap.",
    roles=_ROLES,
    buckets=GAPS_S,
)
REQUEST_TOKENS = Metric(
    name="starmesh.request.tokens",
    kind=Kind.HISTOGRAM,
    unit="{token}",
    description="Tokens of a request's prompt (input) and of its answer (output).",
    roles=_ROLES,
    attributes=(names.TOKEN_TYPE,),
    buckets=TOKENS,
)
REQUESTS = Metric(
    name="starmesh.requests",
    kind=Kind.COUNTER,
    unit="{request}",
    description="Requests that have ended, by finish reason or, where they failed or were refused, by status code.",
    roles=_ROLES,
    attributes=(names.OUTCOME,),
)
REFUSED_CALLS = Metric(
    name="starmesh.refused_calls",
    kind=Kind.COUNTER,
    unit="{call}",
    description="Calls that never became requests: kept out by their API key or, over HTTP, refused as they came. "
    "error.type is gRPC's name of the status, or HTTP's number.",
    roles=_ROLES,
    attributes=(names.ERROR_TYPE,),
)
ACTIVE_REQUESTS = Metric(
    name="starmesh.requests.active",
    kind=Kind.UP_DOWN_COUNTER,
    unit="{request}",
    description="Requests in flight, waiting ones included.",
    roles=_ROLES,
)
DETACHED_REQUESTS = Metric(
    name="starmesh.requests.detached",
    kind=Kind.GAUGE,
    unit="{request}",
    description="Requests whose client is away and may resume them: running ones, and complete answers that are kept.",
    roles=_ROLES,
    attributes=(names.STATE,),
)
QUEUED_REQUESTS = Metric(
    name="starmesh.requests.queued",
    kind=Kind.GAUGE,
    unit="{request}",
    description="Requests that wait for an instance with room.",
    roles=_ROLES,
)
QUEUE_DURATION = Metric(
    name="starmesh.queue.duration",
    kind=Kind.HISTOGRAM,
    unit="s",
    description="How long a dispatch took: the wait for room, and the reservation. error.type is why it failed.",
    roles=_ROLES,
    attributes=(names.ERROR_TYPE,),
    buckets=WAITS_S,
)
RECOVERIES = Metric(
    name="starmesh.recoveries",
    kind=Kind.COUNTER,
    unit="{recovery}",
    description="Times that a request was prefilled again because an instance had lost it.",
    roles=_ROLES,
)
CLUSTER_INSTANCES = Metric(
    name="starmesh.cluster.instances",
    kind=Kind.GAUGE,
    unit="{instance}",
    description="Instances in the router's view of the ledger.",
    roles=_ROLES,
    attributes=(names.ROLE, names.STATE),
)
