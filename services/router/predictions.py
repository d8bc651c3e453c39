"""What the predictor says of a request that has just been prefilled.

Owns the calls to the predictor and the rest after one that failed: a request goes on without an estimate at once, and
those after it do not wait for the same. Owns no use of an estimate (``dispatcher``, ``life``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable

import grpc.aio
from opentelemetry import trace

from starmesh.rpc import convert
from starmesh.rpc.channels import ChannelPool
from starmesh.rpc.credentials import Credentials
from starmesh.telemetry.setup import address_attributes, current_traceparent, link_to
from starmesh.types import InstanceInfo, RemainingEstimate, SequenceSpec
from starmesh.v1 import predictor_pb2, predictor_pb2_grpc, prefill_pb2

log = logging.getLogger(__name__)

# Of requests that come meanwhile none waits for a predictor that is late or gone; one that is back serves soon.
_REST_S = 1.0


class Predictions:
    """Asks whichever predictor ``find`` names."""

    def __init__(
        self,
        find: Callable[[], InstanceInfo | None],
        credentials: Credentials | None,
        *,
        instance_id: str,
        timeout_s: float,
    ) -> None:
        """``instance_id`` is this router's. A predictor that does not answer within ``timeout_s`` has failed."""
        self._find = find
        self._instance_id = instance_id
        self._timeout_s = timeout_s
        self._channels = ChannelPool(credentials)
        self._loop = asyncio.get_running_loop()
        self._calls = 0
        self._failed = ""
        """The incarnation that failed the last time."""
        self._rests_until_s = 0.0

    async def ask(self, spec: SequenceSpec, prefilled: prefill_pb2.PrefillResponse) -> RemainingEstimate | None:
        """The estimate for a sequence as it was prefilled. None when the prefill sent no hidden state, no predictor is
        up, it rests, or it does not answer as it should; never raises for any of that."""
        predictor = self._find()
        if predictor is None or not prefilled.hidden_state or self._rests(predictor):
            return None
        position = len(spec.output_token_ids)
        sample = predictor_pb2.PredictionSample(
            request_id=spec.request_id,
            prompt_tokens=len(spec.prompt_token_ids),
            output_tokens=position,
            hidden_state=prefilled.hidden_state,
            traceparent=current_traceparent(),
        )
        request = predictor_pb2.PredictRequest(
            instance_id=self._instance_id, layout=prefilled.hidden_layout, samples=[sample]
        )
        stub = predictor_pb2_grpc.PredictorServiceStub(self._channels.get(predictor.address))
        trace.get_current_span().set_attributes(address_attributes(predictor.address))
        self._calls += 1
        try:
            answer = await stub.Predict(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            self._note_failure(predictor, f"{error.code().name}: {error.details()}")
            return None
        finally:
            self._calls -= 1
        if self._failed == predictor.incarnation:
            self._failed = ""
            log.info("the predictor %s answers again", predictor.instance_id)
        link_to(trace.get_current_span(), answer.traceparent)
        for found in answer.estimates:
            # One that was dropped is missing.
            if found.request_id == spec.request_id and found.estimate.output_tokens == position:
                return convert.estimate(found.estimate)
        return None

    async def retain(self, instances: list[InstanceInfo]) -> None:
        """Close the channels to all others, unless a call is in progress."""
        if not self._calls:
            await self._channels.retain({instance.address for instance in instances})

    async def close(self) -> None:
        """Close all channels."""
        await self._channels.close()

    def _rests(self, predictor: InstanceInfo) -> bool:
        return self._failed == predictor.incarnation and self._loop.time() < self._rests_until_s

    def _note_failure(self, predictor: InstanceInfo, reason: str) -> None:
        self._rests_until_s = self._loop.time() + _REST_S
        if self._failed != predictor.incarnation:
            self._failed = predictor.incarnation
            log.warning("dispatch goes on without the predictor %s: %s", predictor.instance_id, reason)


def aged(estimate: RemainingEstimate, output_tokens: int) -> RemainingEstimate:
    """The estimate of a sequence that has come to ``output_tokens`` since."""
    since = output_tokens - estimate.output_tokens
    return dataclasses.replace(
        estimate,
        output_tokens=output_tokens,
        remaining_tokens=max(0, estimate.remaining_tokens - since),
        remaining_tokens_upper=max(0, estimate.remaining_tokens_upper - since),
    )
