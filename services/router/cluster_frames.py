"""The cluster at one moment as people watch it: one message for terminals, the live page and whoever else asks.

Owns what the message is made of, and that watchers at the same time share one. Owns no transport (``cluster_servicer``,
``http.live``), and reads the rounds and the predictor only while somebody watches.
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import logging
import time
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from services.router.activity import Activity, ActivitySummary
from services.router.cluster_predictor import read_predictor
from services.router.latencies import Latencies
from services.router.ledger_watch import LedgerWatch
from services.router.looks import Look
from services.router.move_messages import move_messages, round_messages
from services.router.outlooks import Outlook, outlooks
from services.router.router import Router
from services.router.seen_moves import SeenMoves
from starmesh.ledger import Ledger, LedgerError
from starmesh.rounds import RoundSummary
from starmesh.rpc import convert
from starmesh.rpc.credentials import Credentials
from starmesh.rpc.status import StatusError
from starmesh.types import ClusterView, InstanceView
from starmesh.v1 import cluster_pb2, predictor_pb2

log = logging.getLogger(__name__)

_ROUNDS_INTERVAL_S: Final = 0.5
_PREDICTOR_INTERVAL_S: Final = 5.0
_PATIENCE_S: Final = 1.0
_SHARED_S: Final = 0.09
"""Below the shortest interval that a watcher may ask for."""


class ClusterFrames:
    """The present state, again and again. ``close`` it."""

    def __init__(
        self,
        ledger: Ledger,
        watch: LedgerWatch,
        router: Router,
        activity: Activity,
        moves: SeenMoves,
        *,
        router_id: str,
        credentials: Credentials | None,
    ) -> None:
        """``credentials`` are for the call to the predictor."""
        self.stopping = router.stopping
        """Set when nobody should watch this router any longer."""
        self._ledger = ledger
        self._watch = watch
        self._router = router
        self._activity = activity
        self._moves = moves
        self._router_id = router_id
        self._credentials = credentials
        self._rounds: Look[tuple[RoundSummary, ...]] = Look(
            self._read_rounds, (), interval_s=_ROUNDS_INTERVAL_S, patience_s=_PATIENCE_S
        )
        self._predictor: Look[predictor_pb2.PredictorStatus | None] = Look(
            self._read_predictor, None, interval_s=_PREDICTOR_INTERVAL_S, patience_s=_PATIENCE_S
        )
        self._loop = asyncio.get_running_loop()
        self._shared: tuple[float, int, cluster_pb2.WatchClusterResponse] | None = None

    async def frame(self, *, max_sequences: int = 0) -> cluster_pb2.WatchClusterResponse:
        """The cluster now, with at most ``max_sequences`` sequences, 0 for all. Shared: not to be changed."""
        rounds, predictor = await self._rounds.value(), await self._predictor.value()
        now_s = self._loop.time()
        if self._shared is not None:
            made_s, limit, frame = self._shared
            if limit == max_sequences and now_s - made_s < _SHARED_S:
                return frame
        frame = self._make(rounds, predictor, max_sequences)
        self._shared = (now_s, max_sequences, frame)
        return frame

    async def close(self) -> None:
        """Ask nobody any more."""
        await self._rounds.close()
        await self._predictor.close()

    def _make(
        self, rounds: tuple[RoundSummary, ...], predictor: predictor_pb2.PredictorStatus | None, max_sequences: int
    ) -> cluster_pb2.WatchClusterResponse:
        view, seen = self._watch.view, list(self._moves)
        now = Timestamp()
        now.GetCurrentTime()
        messages = round_messages(rounds, seen, now_s=view.now_s)
        return cluster_pb2.WatchClusterResponse(
            observe_time=now,
            instances=instance_messages(view, max_sequences=max_sequences),
            queued_requests=self._router.queued_requests,
            active_requests=self._router.active_requests,
            ledger_available=self._watch.available,
            activity=_activity(self._activity.summary()),
            migrations=move_messages(messages, seen, now_s=time.monotonic()),
            rounds=messages,
            predictor=predictor,
            router_id=self._router_id,
        )

    async def _read_rounds(self) -> tuple[RoundSummary, ...]:
        try:
            return await self._ledger.rounds()
        except LedgerError as error:
            log.debug("no rounds to show: %s", error)
            return ()

    async def _read_predictor(self) -> predictor_pb2.PredictorStatus | None:
        try:
            answer = await read_predictor(self._watch.find_predictor(), self._credentials, timeout_s=_PATIENCE_S)
        except StatusError as error:
            log.debug("no predictor to show: %s", error)
            return None
        return answer.status


def instance_messages(view: ClusterView, *, max_sequences: int = 0) -> list[cluster_pb2.Instance]:
    """By role, then id, with what is predicted of each; of each at most its share of ``max_sequences``, 0 for all."""
    expected = outlooks(view)
    limit = max(1, max_sequences // max(1, len(expected))) if max_sequences else None
    messages = [
        _instance(instance, expected.get(instance.info.instance_id), limit, now_s=view.now_s)
        for instance in view.instances
    ]
    return sorted(messages, key=lambda message: (message.role, message.instance_id))


def _instance(view: InstanceView, outlook: Outlook | None, limit: int | None, *, now_s: float) -> cluster_pb2.Instance:
    if view.load is not None and limit is not None and len(view.load.sequences) > limit:
        sequences = view.load.sequences
        largest = heapq.nlargest(limit, range(len(sequences)), key=lambda place: sequences[place].resident_tokens)
        listed = tuple(sequences[place] for place in sorted(largest))
        view = dataclasses.replace(view, load=dataclasses.replace(view.load, sequences=listed))
    message = convert.instance_pb(view, now_s=now_s)
    if outlook is not None:
        message.predicted_tokens, message.peak_tokens = outlook.predicted_tokens, outlook.peak_tokens
    return message


def _activity(summary: ActivitySummary) -> cluster_pb2.RouterActivity:
    return cluster_pb2.RouterActivity(
        requests_per_second=summary.requests_per_s,
        tokens_per_second=summary.tokens_per_s,
        window=convert.duration_pb(summary.window_s),
        finished_requests=summary.finished_requests,
        failed_requests=summary.failed_requests,
        ttft=_latencies(summary.ttft),
        tpot=_latencies(summary.tpot),
        end_to_end=_latencies(summary.end_to_end),
    )


def _latencies(latencies: Latencies) -> cluster_pb2.LatencySummary:
    message = cluster_pb2.LatencySummary(
        count=latencies.count, p99_history=map(convert.duration_pb, latencies.p99_history_s)
    )
    if latencies.count:
        message.p50.CopyFrom(convert.duration_pb(latencies.p50_s))
        message.p90.CopyFrom(convert.duration_pb(latencies.p90_s))
        message.p99.CopyFrom(convert.duration_pb(latencies.p99_s))
    return message
