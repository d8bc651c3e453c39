"""What the routes of the front door share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from services.router.cluster_frames import ClusterFrames
from services.router.config import RouterSettings
from services.router.ledger_watch import LedgerWatch
from services.router.metrics import RouterMetrics
from services.router.model import ServedModel
from services.router.router import Router
from starmesh.rpc.api_keys import ApiKeys


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpParts:
    """The running router as its HTTP side sees it. Without ``keys`` everybody is admitted."""

    settings: RouterSettings
    router: Router
    model: ServedModel
    watch: LedgerWatch
    frames: ClusterFrames
    metrics: RouterMetrics
    keys: ApiKeys | None = None
    started_at_s: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970; what OpenAI's clients are told the model was made at."""

    @property
    def ready(self) -> bool:
        """Whether new requests are taken: what ``grpc.health.v1`` says too."""
        return self.watch.ready.is_set() and not self.router.stopping.is_set()
