"""What this router's requests have done lately: how many came and ended, how fast tokens flow, how long things took.

Owns the counts and the window that they are of. Owns no request (``life``) and no instrument: this is for people who
look at the router now; what is to be kept goes to metrics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from services.router.flight import Flight
from services.router.latencies import WINDOW_S, Latencies, RecentLatencies
from starmesh.types import FinishReason

RATE_WINDOW_S: Final = 10.0
_SAMPLE_INTERVAL_S: Final = 1.0
_FINISHED: Final = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True)
class ActivitySummary:
    """Rates per second over some ``RATE_WINDOW_S``; counts and latencies of the last ``window_s``."""

    requests_per_s: float
    tokens_per_s: float
    window_s: float
    finished_requests: int
    failed_requests: int
    ttft: Latencies
    tpot: Latencies
    end_to_end: Latencies


@dataclass(slots=True)
class _Request:
    began_s: float
    first_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    requests: int
    tokens: int


class Activity:
    """Told of each request's beginning, first token and end, and now and then of the time."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        """``now_s`` is a clock that does not go back."""
        self._now_s = now_s
        self._running: dict[Flight, _Request] = {}
        self._requests = 0
        self._ended_tokens = 0
        self._samples: deque[_Sample] = deque(maxlen=round(RATE_WINDOW_S / _SAMPLE_INTERVAL_S) + 1)
        self._ttft, self._tpot, self._end_to_end = RecentLatencies(), RecentLatencies(), RecentLatencies()
        # Of these only the counts are looked at.
        self._failed = RecentLatencies()

    def began(self, flight: Flight) -> None:
        """A request was taken in."""
        self._running[flight] = _Request(self._now_s())
        self._requests += 1

    def first_token(self, flight: Flight) -> None:
        """Its first token is here."""
        request, now_s = self._running[flight], self._now_s()
        request.first_s = now_s
        self._ttft.add(now_s - request.began_s, now_s=now_s)

    def ended(self, flight: Flight) -> None:
        """It is over. A request that its client has left, or cancelled, is neither finished nor failed."""
        request, now_s = self._running.pop(flight), self._now_s()
        tokens = _tokens(flight)
        self._ended_tokens += tokens
        if flight.error is not None:
            self._failed.add(now_s - request.began_s, now_s=now_s)
        elif flight.stream.finish_reason in _FINISHED:
            self._end_to_end.add(now_s - request.began_s, now_s=now_s)
            if request.first_s is not None and tokens > 1:
                self._tpot.add((now_s - request.first_s) / (tokens - 1), now_s=now_s)

    def sample(self) -> None:
        """Take note of the time, for the rates; may be called much more often than it matters."""
        now_s = self._now_s()
        if self._samples and now_s - self._samples[-1].at_s < _SAMPLE_INTERVAL_S:
            return
        # Tokens are not counted one by one as they come: looking at all requests once a second costs less.
        self._samples.append(_Sample(now_s, self._requests, self._ended_tokens + sum(map(_tokens, self._running))))

    def summary(self) -> ActivitySummary:
        """As of now."""
        now_s = self._now_s()
        requests_per_s = tokens_per_s = 0.0
        if len(self._samples) > 1:
            first, last = self._samples[0], self._samples[-1]
            passed_s = last.at_s - first.at_s
            requests_per_s = (last.requests - first.requests) / passed_s
            tokens_per_s = (last.tokens - first.tokens) / passed_s
        end_to_end = self._end_to_end.summary(now_s=now_s)
        return ActivitySummary(
            requests_per_s=requests_per_s,
            tokens_per_s=tokens_per_s,
            window_s=WINDOW_S,
            finished_requests=end_to_end.count,
            failed_requests=self._failed.summary(now_s=now_s).count,
            ttft=self._ttft.summary(now_s=now_s),
            tpot=self._tpot.summary(now_s=now_s),
            end_to_end=end_to_end,
        )


def _tokens(flight: Flight) -> int:
    """Those made here."""
    return len(flight.stream.token_ids) - flight.brought_tokens
