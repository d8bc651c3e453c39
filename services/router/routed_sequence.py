"""One request's sequence as this router asks instances to go on with it: in dispatch, prefill and decode.

Owns what is known of the sequence beside its stream: its specification under the present epoch, how long it is
predicted to become, and which instances have not done well by it. Owns no stream state (``flight``) and no course of
events (``life``).
"""

from __future__ import annotations

import dataclasses

from services.router.flight import Flight
from services.router.placement import Demand
from services.router.predictions import aged
from starmesh.policy.admission import Need
from starmesh.rpc import convert
from starmesh.telemetry.setup import current_traceparent
from starmesh.types import KvLayout, RemainingEstimate, SequenceSpec
from starmesh.v1 import decode_pb2, prefill_pb2


class RoutedSequence:
    """Every message begins from the tokens that the flight has accepted."""

    def __init__(self, flight: Flight, spec: SequenceSpec) -> None:
        self.spec = spec
        self.avoid: set[str] = set()
        """Instances that refused or failed it."""
        self.estimate: RemainingEstimate | None = None
        """What was predicted from the last prefill."""
        self._flight = flight

    def claimed(self, epoch: int) -> None:
        """Go on under a new epoch."""
        self.spec = dataclasses.replace(self.spec, epoch=epoch)

    def demand(self, deadline_s: float) -> Demand:
        """What it wants of dispatch now."""
        stream, spec = self._flight.stream, self.spec
        output_tokens = len(stream.token_ids)
        remaining = stream.max_output_tokens - output_tokens
        estimate = None if self.estimate is None else aged(self.estimate, output_tokens)
        if spec.sampling.ignore_eos:
            # Nothing but its limit ends it.
            estimate = RemainingEstimate(output_tokens, remaining, remaining)
        return Demand(
            request_id=spec.request_id,
            need=Need(tokens=len(spec.prompt_token_ids) + output_tokens, remaining_output_tokens=remaining),
            deadline_s=min(deadline_s, self._flight.deadline_s),
            priority=spec.priority,
            started=self._flight.started,
            avoid=frozenset(self.avoid),
            estimate=estimate,
        )

    def prefill(self, epoch: int, layout: KvLayout | None) -> prefill_pb2.PrefillRequest:
        """Begin anew under ``epoch`` from the tokens so far."""
        output = tuple(self._flight.stream.token_ids)
        self.spec = dataclasses.replace(self.spec, epoch=epoch, output_token_ids=output)
        return prefill_pb2.PrefillRequest(
            sequence=convert.spec_pb(self.spec), model_revision=layout.model_revision if layout else ""
        )

    def start(self, prefilled: prefill_pb2.PrefillResponse, *, timeout_s: float) -> decode_pb2.StartSequence:
        """Decode from what the prefill has made. ``timeout_s`` is for the instance."""
        spec = dataclasses.replace(self.spec, output_token_ids=tuple(self._flight.stream.token_ids))
        return decode_pb2.StartSequence(
            sequence=convert.spec_pb(spec),
            ticket=prefilled.ticket,
            timeout=convert.duration_pb(timeout_s),
            traceparent=current_traceparent(),
            hidden_state=prefilled.hidden_state,
            hidden_layout=prefilled.hidden_layout if prefilled.HasField("hidden_layout") else None,
            estimate=convert.estimate_pb(self.estimate) if self.estimate is not None else None,
        )
