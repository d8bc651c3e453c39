"""What travels between the parts of the world: outputs, calls, and questions to the ledger."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starmesh.migration.terms import LedgerSilent, OwnerIs
from starmesh.types import Ownership

if TYPE_CHECKING:
    from tests.migration.instance_model import Instance


@dataclass(frozen=True)
class Output:
    request_id: str
    epoch: int
    offset: int
    token_ids: tuple[int, ...] = ()
    finished: bool = False
    failed: bool = False
    moved_to: Ownership | None = None


@dataclass(eq=False)
class Link:
    """A router's stream to one life of an instance: in order both ways, until it breaks."""

    instance: Instance
    down: deque[Output] = field(default_factory=deque)
    up: deque[tuple[str, Any]] = field(default_factory=deque)
    broken: bool = False


@dataclass(eq=False)
class LedgerCall:
    """A claim (``new`` set) or a question, asked not before ``at_s``. ``answer`` takes OwnerIs or LedgerSilent."""

    answer: Callable[[OwnerIs | LedgerSilent], None]
    request_id: str
    new: Ownership | None = None
    expected: Ownership | None = None
    at_s: float = 0.0


@dataclass(eq=False)
class Call:
    number: int
    caller: Instance
    request_id: str
