"""What all requests of a router share."""

from __future__ import annotations

from dataclasses import dataclass

from services.router.activity import Activity
from services.router.config import RouterSettings
from services.router.decode_link import DecodeLinks
from services.router.dispatcher import Dispatcher
from services.router.ledger_watch import LedgerWatch
from services.router.metrics import RouterMetrics
from services.router.model import ServedModel
from services.router.owners import Owners
from services.router.predictions import Predictions
from services.router.prefill_calls import PrefillCalls
from services.router.seen_moves import SeenMoves


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a running router that a request's life uses."""

    settings: RouterSettings
    model: ServedModel
    watch: LedgerWatch
    dispatcher: Dispatcher
    owners: Owners
    links: DecodeLinks
    prefills: PrefillCalls
    predictions: Predictions
    activity: Activity
    moves: SeenMoves
    metrics: RouterMetrics
