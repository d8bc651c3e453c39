"""Protobuf messages <-> ``starmesh.types``. Only shape: checks of what a client sent are the router's."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from starmesh.types import (
    FinishReason,
    HiddenLayout,
    InstanceInfo,
    InstanceLoad,
    InstanceState,
    InstanceView,
    KvLayout,
    KvTicket,
    RemainingEstimate,
    Role,
    SamplingParams,
    SequenceLoad,
    SequenceSpec,
    TransferBackend,
)
from starmesh.v1 import cluster_pb2, predictor_pb2, sequence_pb2

_FINISH = {
    FinishReason.STOP: sequence_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: sequence_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: sequence_pb2.FINISH_REASON_CANCELLED,
}
_FINISH_BACK = {value: key for key, value in _FINISH.items()}
_BACKENDS = {
    TransferBackend.STREAM: sequence_pb2.TRANSFER_BACKEND_STREAM,
    TransferBackend.NIXL: sequence_pb2.TRANSFER_BACKEND_NIXL,
}
_ROLES = {
    Role.PREFILL: cluster_pb2.ROLE_PREFILL,
    Role.DECODE: cluster_pb2.ROLE_DECODE,
    Role.ROUTER: cluster_pb2.ROLE_ROUTER,
    Role.RESCHEDULER: cluster_pb2.ROLE_RESCHEDULER,
    Role.PREDICTOR: cluster_pb2.ROLE_PREDICTOR,
}
_STATES = {
    InstanceState.READY: cluster_pb2.INSTANCE_STATE_READY,
    InstanceState.DRAINING: cluster_pb2.INSTANCE_STATE_DRAINING,
    InstanceState.DRAINED: cluster_pb2.INSTANCE_STATE_DRAINED,
}


def duration_pb(seconds: float) -> Duration:
    """Seconds as a Duration, to the nanosecond."""
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def duration_s(duration: Duration) -> float:
    """A Duration as seconds."""
    return float(duration.seconds) + float(duration.nanos) / 1e9


def finish_reason_pb(reason: FinishReason | None) -> sequence_pb2.FinishReason.ValueType:
    """None, of a sequence that runs, is unspecified."""
    return sequence_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH[reason]


def finish_reason(reason: sequence_pb2.FinishReason.ValueType) -> FinishReason | None:
    """Unspecified, or a reason of a newer peer, is None."""
    return _FINISH_BACK.get(reason)


def layout_pb(layout: KvLayout) -> sequence_pb2.KvLayout:
    return sequence_pb2.KvLayout(
        model_revision=layout.model_revision,
        dtype=layout.dtype,
        layers=layout.layers,
        kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
    )


def layout(message: sequence_pb2.KvLayout) -> KvLayout:
    return KvLayout(
        model_revision=message.model_revision,
        dtype=message.dtype,
        layers=message.layers,
        kv_heads=message.kv_heads,
        head_dim=message.head_dim,
        block_tokens=message.block_tokens,
    )


def ticket_pb(ticket: KvTicket) -> sequence_pb2.KvTicket:
    return sequence_pb2.KvTicket(
        lease_id=ticket.lease_id,
        instance_id=ticket.instance_id,
        address=ticket.address,
        layout=layout_pb(ticket.layout),
        block_ids=ticket.block_ids,
        resident_tokens=ticket.resident_tokens,
        lease_duration=duration_pb(ticket.lease_duration_s),
    )


def ticket(message: sequence_pb2.KvTicket) -> KvTicket:
    return KvTicket(
        lease_id=message.lease_id,
        instance_id=message.instance_id,
        address=message.address,
        layout=layout(message.layout),
        block_ids=tuple(message.block_ids),
        resident_tokens=message.resident_tokens,
        lease_duration_s=duration_s(message.lease_duration),
    )


def sampling_pb(sampling: SamplingParams) -> sequence_pb2.SamplingParams:
    return sequence_pb2.SamplingParams(
        max_output_tokens=sampling.max_output_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        stop_strings=sampling.stop_strings,
        seed=sampling.seed,
        ignore_eos=sampling.ignore_eos,
    )


def sampling(message: sequence_pb2.SamplingParams) -> SamplingParams:
    """From a message with every field set, as a SequenceSpec carries it."""
    return SamplingParams(
        max_output_tokens=message.max_output_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        repetition_penalty=message.repetition_penalty,
        stop_strings=tuple(message.stop_strings),
        seed=message.seed,
        ignore_eos=message.ignore_eos,
    )


def spec_pb(spec: SequenceSpec) -> sequence_pb2.SequenceSpec:
    return sequence_pb2.SequenceSpec(
        request_id=spec.request_id,
        epoch=spec.epoch,
        prompt_token_ids=spec.prompt_token_ids,
        output_token_ids=spec.output_token_ids,
        sampling=sampling_pb(spec.sampling),
        priority=spec.priority,
    )


def spec(message: sequence_pb2.SequenceSpec) -> SequenceSpec:
    return SequenceSpec(
        request_id=message.request_id,
        epoch=message.epoch,
        prompt_token_ids=tuple(message.prompt_token_ids),
        output_token_ids=tuple(message.output_token_ids),
        sampling=sampling(message.sampling),
        priority=message.priority,
    )


def state_pb(state: InstanceState) -> cluster_pb2.InstanceState.ValueType:
    return _STATES[state]


def load_pb(load: InstanceLoad) -> cluster_pb2.InstanceLoad:
    return cluster_pb2.InstanceLoad(
        total_blocks=load.total_blocks,
        free_blocks=load.free_blocks,
        running_sequences=load.running_sequences,
        waiting_sequences=load.waiting_sequences,
        resident_tokens=load.resident_tokens,
        step_duration=duration_pb(load.step_duration_s),
        output_tokens=load.output_tokens,
        preemptions=load.preemptions,
        transfer_bytes=load.transfer_bytes,
        transfer_backend=(
            _BACKENDS[load.transfer_backend]
            if load.transfer_backend is not None
            else sequence_pb2.TRANSFER_BACKEND_UNSPECIFIED
        ),
        incoming_migrations=load.incoming_migrations,
        outgoing_migrations=load.outgoing_migrations,
        migrated_sequences=load.migrated_sequences,
        sequences=[_sequence_load_pb(sequence) for sequence in load.sequences],
    )


def _sequence_load_pb(load: SequenceLoad) -> cluster_pb2.SequenceLoad:
    return cluster_pb2.SequenceLoad(
        request_id=load.request_id,
        epoch=load.epoch,
        prompt_tokens=load.prompt_tokens,
        output_tokens=load.output_tokens,
        resident_tokens=load.resident_tokens,
        max_output_tokens=load.max_output_tokens,
        remaining_tokens=load.remaining_tokens,
        remaining_tokens_upper=load.remaining_tokens_upper,
        prediction_age_tokens=load.prediction_age_tokens,
    )


def instance_pb(view: InstanceView, *, now_s: float) -> cluster_pb2.Instance:
    """An instance as of ``now_s`` on the clock of ``view.reported_at_s``."""
    info: InstanceInfo = view.info
    message = cluster_pb2.Instance(
        instance_id=info.instance_id,
        role=_ROLES[info.role],
        state=_STATES[info.state],
        address=info.address,
        transfer_backends=[_BACKENDS[backend] for backend in info.transfer_backends],
        reserved_tokens=view.reserved_tokens,
    )
    if info.layout is not None:
        message.layout.CopyFrom(layout_pb(info.layout))
    if view.load is not None:
        message.load.CopyFrom(load_pb(view.load))
        message.report_age.CopyFrom(duration_pb(max(0.0, now_s - view.reported_at_s)))
    return message


def hidden_layout_pb(layout: HiddenLayout) -> predictor_pb2.HiddenLayout:
    """The message of a hidden layout."""
    return predictor_pb2.HiddenLayout(model_revision=layout.model_revision, layers=layout.layers, width=layout.width)


def hidden_layout(message: predictor_pb2.HiddenLayout) -> HiddenLayout:
    """The hidden layout of a message."""
    return HiddenLayout(message.model_revision, tuple(message.layers), message.width)


def estimate_pb(estimate: RemainingEstimate) -> sequence_pb2.RemainingEstimate:
    """The message of an estimate."""
    return sequence_pb2.RemainingEstimate(
        output_tokens=estimate.output_tokens,
        remaining_tokens=estimate.remaining_tokens,
        remaining_tokens_upper=estimate.remaining_tokens_upper,
    )


def estimate(message: sequence_pb2.RemainingEstimate) -> RemainingEstimate:
    """The estimate of a message."""
    return RemainingEstimate(message.output_tokens, message.remaining_tokens, message.remaining_tokens_upper)
