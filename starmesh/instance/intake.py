"""What an instance demands of a sequence that a router sends, before anything is done for it. Pure.

Owns only what would harm others here: an id or an epoch that cannot be reported would keep the whole load out of the
ledger. What a client may ask for is the router's.
"""

from __future__ import annotations

from starmesh.ledger.limits import check_epoch, check_ids
from starmesh.rpc.status import bad_field
from starmesh.types import SequenceSpec


def check_sequence(spec: SequenceSpec) -> None:
    """Raise StatusError, naming the field, for a sequence that cannot be taken."""
    try:
        check_ids(spec.request_id)
    except ValueError as error:
        raise bad_field("sequence.request_id", str(error)) from None
    try:
        check_epoch(spec.epoch)
    except ValueError as error:
        raise bad_field("sequence.epoch", str(error)) from None
    if not spec.prompt_token_ids:
        raise bad_field("sequence.prompt_token_ids", "is empty")
