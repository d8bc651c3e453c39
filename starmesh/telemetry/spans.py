"""Every span that a mesh makes: who makes it, below which, linked to which, with which attributes and events.

Owns data. The services write the code that makes the spans; a test with real traffic demands that they make these and
no others, and docs/tracing.md shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from opentelemetry.trace import SpanKind

from starmesh.telemetry import names

ROOT: Final = ""
"""In ``parents``: a span may begin a trace, or continue one of a client's."""

ON_FAILURE: Final = (names.ERROR_TYPE,)
"""Any span that fails has these too, and ERROR as its status."""

ANY_SUFFIX: Final = ".*"
"""At the end of an attribute's name: it is a family, of which a span has any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRow:
    """A span. ``services`` are roles; ``parents`` and ``links`` are names of spans; ``always`` are the attributes that
    it has however it ends, ``sometimes`` those that it has if there is something to say. ``events`` have their
    attributes."""

    name: str
    what: str
    services: tuple[str, ...]
    parents: tuple[str, ...]
    always: tuple[str, ...]
    sometimes: tuple[str, ...] = ()
    links: tuple[str, ...] = ()
    kinds: tuple[SpanKind, ...] = (SpanKind.INTERNAL,)
    events: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_SEQUENCE: Final = (names.REQUEST_ID, names.EPOCH, names.INSTANCE_ID)

SPANS: Final = (
    SpanRow(
        name=names.SPAN_GENERATE,
        what="A request, from its receipt to its last message or its refusal.",
        services=("router",),
        kinds=(SpanKind.SERVER,),
        parents=(ROOT,),
        always=(names.OPERATION, names.PROVIDER, names.MODEL, names.OUTPUT_TYPE),
        sometimes=(
            names.REQUEST_ID,
            names.MAX_TOKENS,
            names.TEMPERATURE,
            names.TOP_P,
            names.TOP_K,
            names.SEED,
            names.RESPONSE_MODEL,
            names.INPUT_TOKENS,
            names.CACHED_TOKENS,
            names.OUTPUT_TOKENS,
            names.FINISH_REASONS,
            names.TIME_TO_FIRST_CHUNK,
            names.RECOVERIES,
            names.MIGRATIONS,
        ),
        events={
            names.EVENT_FIRST_TOKEN: (),
            names.EVENT_MOVED: (
                names.SOURCE_INSTANCE,
                names.TARGET_INSTANCE,
                names.EPOCH,
                names.OUTPUT_TOKENS,
            ),
        },
    ),
    SpanRow(
        name=names.SPAN_DISPATCH,
        what="The choice of instances, with the wait for room.",
        services=("router",),
        parents=(names.SPAN_GENERATE, names.SPAN_RECOVERY),
        always=(names.REQUEST_ID, names.POLICY),
        sometimes=(names.PREFILL_INSTANCE, names.DECODE_INSTANCE),
    ),
    SpanRow(
        name=names.SPAN_PREFILL,
        what="The prompt's queueing and forward, and the first token.",
        services=("prefill",),
        kinds=(SpanKind.SERVER,),
        parents=(names.SPAN_GENERATE, names.SPAN_RECOVERY),
        always=(*_SEQUENCE, names.INPUT_TOKENS),
        sometimes=(names.CACHED_TOKENS, names.QUEUE_S),
    ),
    SpanRow(
        name=names.SPAN_ESTIMATE,
        what="The question to the predictor, and the second choice of a decode instance.",
        services=("router",),
        kinds=(SpanKind.CLIENT,),
        parents=(names.SPAN_GENERATE,),
        links=(names.SPAN_PREDICT,),
        always=(names.REQUEST_ID,),
        sometimes=(names.SERVER_ADDRESS, names.SERVER_PORT, names.REMAINING_TOKENS, names.DECODE_INSTANCE),
    ),
    SpanRow(
        name=names.SPAN_HANDOFF,
        what="The pull of the prompt's KV from the prefill instance.",
        services=("decode",),
        parents=(names.SPAN_GENERATE,),
        always=(*_SEQUENCE, names.PREFILL_INSTANCE),
        sometimes=(names.TRANSFER_BACKEND, names.TRANSFER_BYTES, names.TRANSFER_BLOCKS),
    ),
    SpanRow(
        name=names.SPAN_DECODE,
        what="The time at one decode instance, to the end, a move or a failure.",
        services=("decode",),
        parents=(names.SPAN_GENERATE,),
        always=(*_SEQUENCE, names.OUTPUT_TOKENS),
        sometimes=(names.FINISH_REASONS,),
        events={names.EVENT_MOVED: (names.TARGET_INSTANCE,)},
    ),
    SpanRow(
        name=names.SPAN_MIGRATION_SOURCE,
        what="A move as its source drives it, until the sequence has moved or stays.",
        services=("decode",),
        parents=(names.SPAN_GENERATE,),
        links=(names.SPAN_COMMAND, names.SPAN_EVACUATION),
        always=(
            *_SEQUENCE,
            names.TARGET_INSTANCE,
            names.MIGRATION_REASON,
            names.MIGRATION_OUTCOME,
            names.MIGRATION_ROUNDS,
            names.TRANSFER_BYTES,
            names.MIGRATION_FROZEN_S,
        ),
        sometimes=(names.MIGRATION_CAUSE,),
    ),
    SpanRow(
        name=names.SPAN_MIGRATION_TARGET,
        what="The same move at its target, until a router has come for the tokens.",
        services=("decode",),
        parents=(names.SPAN_MIGRATION_SOURCE,),
        always=(
            *_SEQUENCE,
            names.SOURCE_INSTANCE,
            names.MIGRATION_REASON,
            names.MIGRATION_OUTCOME,
            names.MIGRATION_ROUNDS,
        ),
    ),
    SpanRow(
        name=names.SPAN_TRANSFER,
        what="One pull of a move: a copy round, or the tail while the sequence stands still.",
        services=("decode",),
        parents=(names.SPAN_MIGRATION_TARGET,),
        always=(names.REQUEST_ID, names.SOURCE_INSTANCE, names.TRANSFER_BLOCKS),
        sometimes=(names.TRANSFER_BACKEND, names.TRANSFER_BYTES),
    ),
    SpanRow(
        name=names.SPAN_RECOVERY,
        what="What follows the loss of an instance: dispatch and prefill of prompt and output so far.",
        services=("router",),
        parents=(names.SPAN_GENERATE,),
        always=(names.REQUEST_ID, names.RECOVERIES),
        sometimes=(names.LOST_INSTANCE,),
    ),
    SpanRow(
        name=names.SPAN_PREDICT,
        what="A forward of the predictor, for samples of many requests; none where no request is sampled.",
        services=("predictor",),
        parents=(ROOT,),
        links=(names.SPAN_GENERATE, names.SPAN_ESTIMATE),
        always=(names.VERSION, names.SAMPLES, names.REQUESTS),
    ),
    SpanRow(
        name=names.SPAN_ROUND,
        what="A round of the rescheduler that leads: plan, confirm the lead, command.",
        services=("rescheduler",),
        parents=(ROOT,),
        always=(
            names.RESCHEDULING_POLICY,
            names.LEADER_TERM,
            names.INSTANCES,
            names.MIGRATIONS,
            names.SPREAD_BEFORE_TOKENS,
            names.SPREAD_AFTER_TOKENS,
        ),
        sometimes=(names.SKIPPED + ANY_SUFFIX,),
    ),
    SpanRow(
        name=names.SPAN_COMMAND,
        what="A move commanded to its source, by a round or an operator, until its end is known.",
        services=("rescheduler", "router"),
        kinds=(SpanKind.CLIENT, SpanKind.SERVER),
        parents=(names.SPAN_ROUND, ROOT),
        links=(names.SPAN_MIGRATION_SOURCE,),
        always=(
            names.REQUEST_ID,
            names.EPOCH,
            names.SOURCE_INSTANCE,
            names.TARGET_INSTANCE,
            names.MIGRATION_REASON,
            names.SERVER_ADDRESS,
            names.SERVER_PORT,
        ),
        sometimes=(names.MIGRATION_OUTCOME,),
    ),
    SpanRow(
        name=names.SPAN_DRAIN,
        what="An operator's order to drain, until the instance has taken it; asking again how far it is makes none.",
        services=("router",),
        kinds=(SpanKind.SERVER,),
        parents=(ROOT,),
        always=(names.DRAINED_INSTANCE, names.SERVER_ADDRESS, names.SERVER_PORT),
        sometimes=(names.SEQUENCES,),
    ),
    SpanRow(
        name=names.SPAN_EVACUATION,
        what="Moves that a decode instance begins itself, because it drains or runs short of blocks.",
        services=("decode",),
        parents=(ROOT,),
        links=(names.SPAN_MIGRATION_SOURCE,),
        always=(names.INSTANCE_ID, names.MIGRATIONS, names.MIGRATION_REASON),
    ),
)

ATTRIBUTES: Final[Mapping[str, str]] = {
    names.OPERATION: "`chat` for messages, `text_completion` for text and token ids",
    names.PROVIDER: "`starmesh`",
    names.MODEL: "the served model's name",
    names.RESPONSE_MODEL: "the same",
    names.OUTPUT_TYPE: "`text`",
    names.MAX_TOKENS: "as the client asked",
    names.TEMPERATURE: "as the client asked",
    names.TOP_P: "as the client asked",
    names.TOP_K: "as the client asked",
    names.SEED: "as the client asked",
    names.INPUT_TOKENS: "tokens of the prompt; of a prefill, with the output so far",
    names.CACHED_TOKENS: "of these, tokens whose KV the prefill instance had",
    names.OUTPUT_TOKENS: "tokens generated so far, in all",
    names.FINISH_REASONS: "one: `stop`, `length` or `cancelled`",
    names.TIME_TO_FIRST_CHUNK: "TTFT in seconds",
    names.ERROR_TYPE: "of a span that failed: gRPC's name of the status, or the name of an exception",
    names.SERVER_ADDRESS: "host of the instance called",
    names.SERVER_PORT: "its port",
    names.REQUEST_ID: "the request",
    names.EPOCH: "counts its changes of owner",
    names.INSTANCE_ID: "the instance that made the span",
    names.PREFILL_INSTANCE: "the prefill instance chosen, or pulled from",
    names.DECODE_INSTANCE: "the decode instance chosen",
    names.SOURCE_INSTANCE: "where a sequence moves from",
    names.TARGET_INSTANCE: "where it moves to",
    names.LOST_INSTANCE: "the instance that died or could not be reached",
    names.DRAINED_INSTANCE: "the instance that is to drain",
    names.POLICY: "the dispatch policy",
    names.QUEUE_S: "seconds that the prompt waited for its first forward",
    names.REMAINING_TOKENS: "the predicted tokens to come, the median",
    names.TRANSFER_BACKEND: "`nixl` or `stream`",
    names.TRANSFER_BYTES: "bytes pulled",
    names.TRANSFER_BLOCKS: "KV blocks pulled",
    names.RECOVERIES: "instances lost so far",
    names.MIGRATIONS: "moves of the request, or moves that a round or an evacuation decided",
    names.MIGRATION_REASON: "`load`, `predicted_load`, `memory`, `drain` or `operator`",
    names.MIGRATION_OUTCOME: "source: `moved`, `stayed`, `ended`, `in_doubt`; target: `attached`, `freed`; "
    "rescheduler's command: `moved`, `failed`, `gone`",
    names.MIGRATION_CAUSE: "why it did not move: a refusal of the target's, or what came in between",
    names.MIGRATION_ROUNDS: "copy rounds begun",
    names.MIGRATION_FROZEN_S: "seconds that the sequence was in no batch",
    names.RESCHEDULING_POLICY: "the rescheduling policy",
    names.LEADER_TERM: "the leader's term",
    names.INSTANCES: "decode instances seen",
    names.SKIPPED + ANY_SUFFIX: "instances or sequences that were passed over, by reason",
    names.SPREAD_BEFORE_TOKENS: "spread of the load that the policy measures, before its moves",
    names.SPREAD_AFTER_TOKENS: "as planned, after them",
    names.SEQUENCES: "sequences that an instance has when its drain begins",
    names.VERSION: "the version of the predictor",
    names.SAMPLES: "samples in the forward",
    names.REQUESTS: "requests that they are of; at most 128 are linked",
}
"""What each attribute says."""
