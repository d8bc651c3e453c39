"""What a router measures of its clients' requests.

Owns the instruments. All methods are for the event loop; gauges read single values, or what is replaced as a whole,
from the thread that answers a scrape. Gaps between tokens are counted by each flight into ``gaps``, for a token is to
cost next to nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.router.flight import Flight
from services.router.placement import NotPlaced
from services.router.request_spans import PROVIDER, operation
from starmesh.rpc.status import StatusError
from starmesh.telemetry import instruments, names
from starmesh.telemetry.bucket_counts import BucketCounts
from starmesh.telemetry.metrics import Metrics
from starmesh.telemetry.registry import router
from starmesh.types import ClusterView, FinishReason
from starmesh.v1 import inference_pb2

_FINISHED = (FinishReason.STOP, FinishReason.LENGTH)


class RouterMetrics:
    """``model`` is the name of the one that is served."""

    def __init__(self, metrics: Metrics, *, model: str) -> None:
        meter = metrics.meter
        self._model = model
        self._meter = meter
        self._duration = instruments.histogram(meter, router.REQUEST_DURATION)
        self._ttft = instruments.histogram(meter, router.TIME_TO_FIRST_TOKEN)
        self._tpot = instruments.histogram(meter, router.TIME_PER_OUTPUT_TOKEN)
        self._tokens = instruments.histogram(meter, router.REQUEST_TOKENS)
        self._requests = instruments.counter(meter, router.REQUESTS)
        self._active = instruments.up_down_counter(meter, router.ACTIVE_REQUESTS)
        self._refused = instruments.counter(meter, router.REFUSED_CALLS)
        self._queue = instruments.histogram(meter, router.QUEUE_DURATION)
        self._recoveries = instruments.counter(meter, router.RECOVERIES)
        self.gaps: BucketCounts | None = None
        """Where flights count the gaps between their tokens; None without a page."""
        if metrics.address:
            self.gaps = BucketCounts(router.INTER_TOKEN_LATENCY.buckets)
            metrics.show(router.INTER_TOKEN_LATENCY, self.gaps)

    def watch(
        self,
        *,
        queued: Callable[[], int],
        running_away: Callable[[], int],
        kept: Callable[[], int],
        view: Callable[[], ClusterView],
    ) -> None:
        """Show how many requests wait, how many run or are kept while their client is away, and the instances in the
        last view of the ledger. All are asked from any thread."""

        def detached() -> list[tuple[float, instruments.Attributes]]:
            return [(running_away(), {names.STATE: "running"}), (kept(), {names.STATE: "complete"})]

        def instances() -> list[tuple[float, instruments.Attributes]]:
            counts = Counter((found.info.role.value, found.info.state.value) for found in view().instances)
            # A ready decode instance that vanishes is to be a 0, not a gap.
            for role in ("prefill", "decode"):
                counts.setdefault((role, "ready"), 0)
            return [(count, {names.ROLE: role, names.STATE: state}) for (role, state), count in counts.items()]

        instruments.gauge(self._meter, router.DETACHED_REQUESTS, detached)
        instruments.gauge(self._meter, router.QUEUED_REQUESTS, lambda: [(queued(), {})])
        instruments.gauge(self._meter, router.CLUSTER_INSTANCES, instances)

    def began(self) -> None:
        """A request was taken in; ``ended`` is told of its end."""
        self._active.add(1)

    def ended(self, request: inference_pb2.GenerateRequest, flight: Flight, duration_s: float) -> None:
        """It is over. One whose client has left is CANCELLED, like one that was cancelled."""
        self._active.add(-1)
        attributes, error, finish = self._attributes(request), flight.error, flight.stream.finish_reason
        tokens = len(flight.stream.token_ids) - flight.brought_tokens
        failed = {} if error is None else {names.ERROR_TYPE: error.code.name}
        self._duration.record(duration_s, attributes | failed)
        self._end(error.code.name if error is not None else (finish or FinishReason.CANCELLED).value)
        self._tokens.record(flight.prompt_tokens, {names.TOKEN_TYPE: "input"})
        self._tokens.record(tokens, {names.TOKEN_TYPE: "output"})
        if error is None and finish in _FINISHED and tokens > 1 and flight.first_token_s is not None:
            assert flight.last_token_s is not None
            self._tpot.record((flight.last_token_s - flight.first_token_s) / (tokens - 1), attributes)

    def first_token(self, request: inference_pb2.GenerateRequest, ttft_s: float) -> None:
        """Its first token has come."""
        self._ttft.record(ttft_s, self._attributes(request))

    @contextmanager
    def refusals_counted(self) -> Iterator[None]:
        """A StatusError within the context means that a request was not taken in."""
        try:
            yield
        except StatusError as error:
            self._end(error.code.name)
            raise

    def refused_call(self, error_type: str) -> None:
        """A call was refused before it became a request: ``error_type`` is a status of gRPC's or HTTP's, and so one of
        few."""
        self._refused.add(1, {names.ERROR_TYPE: error_type})

    @contextmanager
    def refused_calls_counted(self) -> Iterator[None]:
        """A StatusError within the context means that a call was refused before it became a request."""
        try:
            yield
        except StatusError as error:
            self.refused_call(error.code.name)
            raise

    def placed(self, duration_s: float, failure: NotPlaced | None) -> None:
        """A dispatch has ended."""
        self._queue.record(duration_s, {} if failure is None else {names.ERROR_TYPE: failure.code.name})

    def recovered(self) -> None:
        """A request is to be prefilled again."""
        self._recoveries.add(1)

    def _end(self, outcome: str) -> None:
        self._requests.add(1, {names.OUTCOME: outcome})

    def _attributes(self, request: inference_pb2.GenerateRequest) -> dict[str, str]:
        return {
            names.OPERATION: operation(request),
            names.PROVIDER: PROVIDER,
            names.MODEL: self._model,
        }
