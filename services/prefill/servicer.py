"""PrefillService: maps the wire to the worker, and what goes wrong to status codes."""

from __future__ import annotations

import grpc
import grpc.aio
from opentelemetry.trace import SpanKind

from services.prefill.worker import Draining, PrefillFailed, PrefillWorker, WrongModel
from starmesh.engine.scheduler import CapacityError, DuplicateRequest, QueueFull
from starmesh.instance.intake import check_sequence
from starmesh.rpc import convert
from starmesh.rpc.status import StatusError, bad_field, retry_later
from starmesh.telemetry import names
from starmesh.telemetry.setup import context_of_call, span
from starmesh.transfer.lease import LeaseTableFull
from starmesh.v1 import prefill_pb2, prefill_pb2_grpc

# A full queue empties at the pace of prompts: about one long prompt on a slow instance.
RETRY_DELAY_S = 0.5


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Serves routers."""

    def __init__(self, worker: PrefillWorker, instance_id: str) -> None:
        self._worker = worker
        self._instance_id = instance_id

    async def Prefill(  # noqa: N802 - gRPC's name
        self,
        request: prefill_pb2.PrefillRequest,
        context: grpc.aio.ServicerContext[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse],
    ) -> prefill_pb2.PrefillResponse:
        spec = convert.spec(request.sequence)
        check_sequence(spec)
        attributes = {names.REQUEST_ID: spec.request_id, names.INSTANCE_ID: self._instance_id}
        trace = context_of_call(context.invocation_metadata())
        with span(names.SPAN_PREFILL, trace, kind=SpanKind.SERVER, attributes=attributes) as current:
            current.set_attribute(names.EPOCH, spec.epoch)
            current.set_attribute(names.INPUT_TOKENS, spec.tokens)
            try:
                done = await self._worker.prefill(spec, request.model_revision)
            except Draining:
                raise retry_later(
                    grpc.StatusCode.UNAVAILABLE, "this instance is draining; use another", RETRY_DELAY_S
                ) from None
            except (QueueFull, LeaseTableFull) as error:
                raise retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), RETRY_DELAY_S) from None
            except WrongModel as error:
                raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
            except CapacityError as error:
                raise bad_field("sequence.prompt_token_ids", str(error)) from None
            except DuplicateRequest:
                raise StatusError(
                    grpc.StatusCode.ALREADY_EXISTS, f"request {spec.request_id} is in progress here"
                ) from None
            except PrefillFailed as error:
                raise StatusError(grpc.StatusCode.ABORTED, str(error)) from None
            current.set_attribute(names.CACHED_TOKENS, done.cached_tokens)
            current.set_attribute(names.QUEUE_S, done.queue_duration_s)
        return prefill_pb2.PrefillResponse(
            token_id=done.token_id,
            finish_reason=convert.finish_reason_pb(done.finish_reason),
            ticket=convert.ticket_pb(done.ticket) if done.ticket is not None else None,
            cached_tokens=done.cached_tokens,
            queue_duration=convert.duration_pb(done.queue_duration_s),
            hidden_state=done.hidden_state,
            hidden_layout=convert.hidden_layout_pb(done.hidden_layout) if done.hidden_layout is not None else None,
        )
