"""The life of one request: dispatch, prefill, hand to decode, and again elsewhere after whatever goes wrong.

Owns what happens next, and that nothing stays behind: no sequence on an instance, no reservation, no ownership entry.
Owns no stream state (``flight``), no choice of instance (``dispatcher``) and no listening to instances (``follower``).

Every turn begins from the accepted tokens, so it does not matter where the last one failed: the next prefill runs
prompt and output so far, and counter-based sampling draws the same token that the lost instance would have drawn.
"""

from __future__ import annotations

import asyncio
import logging

import grpc
from opentelemetry import trace
from opentelemetry.context import Context

from services.router.flight import Broken, Ended, Flight, InstanceLost, Lost, Refused
from services.router.follower import Follower
from services.router.parts import Parts
from services.router.placement import NotPlaced
from services.router.request_spans import asked_attributes, note_end
from services.router.retries import NO_CAPACITY, Retries
from services.router.routed_sequence import RoutedSequence
from services.router.validation import check_length
from starmesh.rpc import convert
from starmesh.rpc.status import StatusError
from starmesh.telemetry import names
from starmesh.telemetry.setup import span
from starmesh.types import FinishReason, InstanceInfo, SequenceSpec
from starmesh.v1 import inference_pb2, prefill_pb2

log = logging.getLogger(__name__)

# An instance's deadline is a net below ours: ours ends the request first, with the right status.
_INSTANCE_SLACK_S = 2.0


class Life:
    """One request's life; ``run`` it once, as a task of its own."""

    def __init__(self, parts: Parts, flight: Flight, request: inference_pb2.GenerateRequest, *, seed: int) -> None:
        self._parts = parts
        self._flight = flight
        self._follower = Follower(parts, flight, timeout_s=self._instance_timeout_s)
        self._request = request
        self._seed = seed
        self._loop = asyncio.get_running_loop()
        self._sequence: RoutedSequence
        self._eos_token_ids: frozenset[int] = frozenset()
        self._recovering = False
        self._lost = ""
        self._span: trace.Span = trace.INVALID_SPAN
        self._began_s = self._loop.time()
        settings = parts.settings
        give_up_s = self._loop.time() + settings.queue_timeout_s
        self._retries = Retries(max_failures=settings.max_recoveries, give_up_s=give_up_s)

    async def run(self, parent: Context) -> None:
        """Run to the end of the stream, its deadline or a cancel; the flight has heard of it then, and nothing of the
        request is left."""
        flight, model = self._flight, self._parts.model.name
        self._parts.activity.began(flight)
        self._parts.metrics.began()
        flight.gaps = self._parts.metrics.gaps
        attributes = {names.REQUEST_ID: flight.request_id, **asked_attributes(self._request, model)}
        try:
            with span(names.SPAN_GENERATE, parent, kind=trace.SpanKind.SERVER, attributes=attributes) as self._span:
                try:
                    async with asyncio.timeout_at(flight.deadline_s):
                        await self._prepare()
                        await self._generate()
                except TimeoutError:
                    flight.fail(StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's deadline passed"))
                except StatusError as error:
                    flight.fail(error)
                except asyncio.CancelledError:
                    if not flight.ended:  # nobody listens any more
                        self._span.set_attribute(names.FINISH_REASONS, [FinishReason.CANCELLED.value])
                    raise
                finally:
                    note_end(self._span, flight, model)
        except Exception:
            log.exception("request %s failed", flight.request_id)
            flight.fail(StatusError(grpc.StatusCode.INTERNAL, "internal error; the router's log has it"))
        finally:
            self._parts.activity.ended(flight)
            self._parts.metrics.ended(self._request, flight, self._loop.time() - self._began_s)
            await self._clean_up()

    async def _prepare(self) -> None:
        flight, model = self._flight, self._parts.model
        prompt = await model.tokenize(self._request)
        facts = model.facts(self._parts.watch.view)
        sampling = check_length(self._request, len(prompt), facts, seed=self._seed)
        flight.prompt_tokens = len(prompt)
        flight.stream.max_output_tokens = sampling.max_output_tokens
        if flight.brought_tokens and not flight.serving:
            brought = flight.stream.token_ids[: flight.brought_tokens]
            detokenizer = await model.detokenizer_after(flight.stop_strings, brought)
            if not flight.serving:  # nor has a stream that resumes come in between
                flight.serve(detokenizer, offset=flight.brought_tokens)
        if not sampling.ignore_eos:
            self._eos_token_ids = facts.eos_token_ids
        spec = SequenceSpec(
            request_id=flight.request_id,
            epoch=0,
            prompt_token_ids=prompt,
            output_token_ids=(),
            sampling=sampling,
            priority=self._request.priority,
        )
        self._sequence = RoutedSequence(flight, spec)

    async def _generate(self) -> None:
        flight = self._flight
        while not flight.find_finish(self._eos_token_ids):
            try:
                await self._turn()
            except InstanceLost as error:
                log.warning("request %s lost %s", flight.request_id, error)
                self._parts.dispatcher.suspect(error.instance_id)
                self._recovering, self._lost = True, error.instance_id
                self._retries.after_failure()  # no wait: this instance is not asked again
            except NotPlaced:
                raise
            except StatusError as error:
                await self._after_refusal(error)

    async def _turn(self) -> None:
        """Prefill and decode once."""
        flight = self._flight
        if self._recovering:
            self._recovering = False
            flight.recoveries += 1
            self._parts.metrics.recovered()
            with span(names.SPAN_RECOVERY, attributes={names.REQUEST_ID: flight.request_id}) as recovery:
                recovery.set_attribute(names.RECOVERIES, flight.recoveries)
                if self._lost:
                    recovery.set_attribute(names.LOST_INSTANCE, self._lost)
                self._lost = ""
                instance, prefilled = await self._prefill()
        else:
            instance, prefilled = await self._prefill()
        tokens = len(flight.stream.token_ids)
        try:
            if not flight.ended:
                instance = await self._choose_anew(instance, prefilled)
                await self._decode(instance, prefilled)
        finally:
            # Nobody has decoded from these blocks: they need not wait for the end of their lease.
            if prefilled.ticket.lease_id and len(flight.stream.token_ids) == tokens:
                self._parts.prefills.release(prefilled.ticket)

    async def _prefill(self) -> tuple[InstanceInfo, prefill_pb2.PrefillResponse]:
        """Dispatch and prefill. Returns the decode instance and what the prefill has; the first token is accepted."""
        flight, parts = self._flight, self._parts
        output_tokens, first = len(flight.stream.token_ids), not flight.started
        # What was predicted from an earlier prefill has aged, and there will be another.
        self._sequence.estimate = None
        placement = await parts.dispatcher.place(self._sequence.demand(flight.deadline_s))
        try:
            epoch = await parts.owners.claim(flight.request_id, placement.decode.instance_id)
            flight.begin(epoch)
            request = self._sequence.prefill(epoch, placement.prefill.layout)
            response = await parts.prefills.prefill(placement.prefill, request, timeout_s=self._instance_timeout_s())
        except StatusError:
            self._sequence.avoid.add(placement.prefill.instance_id)
            raise
        finally:
            parts.dispatcher.prefilled(flight.request_id, placement.prefill.instance_id)
        if first:
            parts.activity.first_token(flight)
            parts.metrics.first_token(self._request, self._loop.time() - self._began_s)
            flight.cached_tokens = response.cached_tokens
            self._span.add_event(names.EVENT_FIRST_TOKEN)
            self._span.set_attribute(names.TIME_TO_FIRST_CHUNK, self._loop.time() - self._began_s)
        flight.accept(epoch, output_tokens, [response.token_id], convert.finish_reason(response.finish_reason))
        return placement.decode, response

    async def _choose_anew(self, instance: InstanceInfo, prefilled: prefill_pb2.PrefillResponse) -> InstanceInfo:
        """Where to decode after all, now that there is something to predict the length from; ``instance`` where the
        policy has no use for it. The client has its first token already."""
        flight, parts = self._flight, self._parts
        if not parts.dispatcher.uses_estimates or self._sequence.spec.sampling.ignore_eos:
            return instance
        attributes = {names.REQUEST_ID: flight.request_id}
        with span(names.SPAN_ESTIMATE, kind=trace.SpanKind.CLIENT, attributes=attributes) as current:
            estimate = self._sequence.estimate = await parts.predictions.ask(self._sequence.spec, prefilled)
            if estimate is None:
                return instance
            current.set_attribute(names.REMAINING_TOKENS, estimate.remaining_tokens)
            layout = convert.layout(prefilled.ticket.layout)
            better = await parts.dispatcher.place_better(self._sequence.demand(flight.deadline_s), layout=layout)
            if better is None:
                return instance
            current.set_attribute(names.DECODE_INSTANCE, better.instance_id)
            self._sequence.claimed(await parts.owners.claim(flight.request_id, better.instance_id))
            return better

    async def _decode(self, instance: InstanceInfo, prefilled: prefill_pb2.PrefillResponse) -> None:
        """Decode at ``instance`` and wherever the sequence moves, or at another while it refuses and the ticket is
        good. Returns at the end of the sequence; raises InstanceLost, or StatusError when it was given up."""
        flight, parts = self._flight, self._parts
        ticket = prefilled.ticket
        lease_ends_s = self._loop.time() + convert.duration_s(ticket.lease_duration)
        tokens = len(flight.stream.token_ids)
        while not flight.ended:
            start = self._sequence.start(prefilled, timeout_s=self._instance_timeout_s())
            stay = await self._follower.decode(instance, start)
            match stay.outcome:
                case Ended():
                    return
                case Lost(error):
                    raise error
                case Broken(description):
                    raise StatusError(grpc.StatusCode.DATA_LOSS, description)
                case Refused(status) if stay.moved:
                    self._after_move(stay.instance, status)
                    raise status
                case Refused(status):
                    self._sequence.avoid.add(instance.instance_id)
                    if status.code is grpc.StatusCode.FAILED_PRECONDITION:
                        self._sequence.avoid.add(ticket.instance_id)
                    untouched = status.code in NO_CAPACITY and len(flight.stream.token_ids) == tokens
                    if not untouched:
                        raise status
                    await self._wait_for_room(status)
                    if self._loop.time() >= lease_ends_s:
                        raise status
                    try:
                        instance = await parts.dispatcher.place_decode(
                            self._sequence.demand(lease_ends_s), layout=convert.layout(ticket.layout)
                        )
                    except NotPlaced:
                        raise status from None
                    self._sequence.claimed(await parts.owners.claim(flight.request_id, instance.instance_id))

    def _after_move(self, instance: InstanceInfo, status: StatusError) -> None:
        """An instance gave up a sequence that had moved, or was said to have moved, there."""
        self._recovering = True
        if status.code is grpc.StatusCode.NOT_FOUND:
            # It had not moved there after all, which is no fault of the instance.
            self._flight.migrations -= 1
        else:
            self._sequence.avoid.add(instance.instance_id)

    def _instance_timeout_s(self) -> float:
        return max(0.0, self._flight.deadline_s - self._loop.time()) + _INSTANCE_SLACK_S

    async def _after_refusal(self, error: StatusError) -> None:
        """Wait before the next turn. Raises StatusError to end the request."""
        flight = self._flight
        if error.code is grpc.StatusCode.ALREADY_EXISTS and not flight.stream.epoch:
            raise error  # another router has a request of this id
        if error.code in NO_CAPACITY:
            await self._wait_for_room(error)
            return
        log.warning("request %s was given up: %s", flight.request_id, error)
        await asyncio.sleep(self._retries.after_failure())

    async def _wait_for_room(self, error: StatusError) -> None:
        started = self._flight.started
        await asyncio.sleep(self._retries.after_refusal(error, self._loop.time(), started=started))

    async def _clean_up(self) -> None:
        request_id = self._flight.request_id
        await self._parts.dispatcher.release(request_id)
        await self._parts.owners.disown(request_id)
