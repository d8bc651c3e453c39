"""Every span, span event and attribute name, once; metrics are in ``registry``. Attributes follow OpenTelemetry's
conventions where they exist (``gen_ai.*``, ``server.*``, ``error.type``); the rest is ``starmesh.*``. What has which:
``spans``."""

# Spans, in the order of a request's life. One trace per request.
SPAN_GENERATE = "starmesh.generate"  # router: receipt to last message
SPAN_DISPATCH = "starmesh.dispatch"  # router: wait for and choice of instances
SPAN_ESTIMATE = "starmesh.estimate"  # router: ask the predictor, and choose the decode instance once more
SPAN_PREFILL = "starmesh.prefill"  # prefill: queue, forward, first token
SPAN_HANDOFF = "starmesh.handoff"  # decode: reserve blocks, pull KV, release the lease
SPAN_DECODE = "starmesh.decode"  # decode: first step to finish, cancel or failure
SPAN_MIGRATION_SOURCE = "starmesh.migration.source"  # decode: from the command until the sequence has moved or stays
SPAN_MIGRATION_TARGET = "starmesh.migration.target"  # decode: from the reservation until a router has come, or not
SPAN_TRANSFER = "starmesh.transfer"  # decode: one pull of a migration, a copy round's or the tail's
SPAN_RECOVERY = "starmesh.recovery"  # router: an instance died; prefill again elsewhere

# A round of the rescheduler has a trace of its own; the migrations that it decides link to it.
SPAN_ROUND = "starmesh.round"  # rescheduler: plan, confirm the lead, command
SPAN_COMMAND = "starmesh.command"  # rescheduler, router: one migration commanded to its source, until its end is known
SPAN_DRAIN = "starmesh.drain"  # router: an operator's drain, until its instance has begun it
SPAN_EVACUATION = "starmesh.evacuation"  # decode: moves that a drain or a shortage of blocks asks for

# A forward of the predictor serves many requests: it is a trace of its own too, linked to theirs.
SPAN_PREDICT = "starmesh.predict"

# Events on spans.
EVENT_FIRST_TOKEN = "first_token"  # noqa: S105 - not a password
EVENT_MOVED = "moved"  # router, decode: the request goes on at another decode instance

# Attributes.
REQUEST_ID = "starmesh.request_id"
EPOCH = "starmesh.epoch"
REMAINING_TOKENS = "starmesh.remaining_tokens"  # as predicted: the median
INSTANCE_ID = "starmesh.instance_id"
PREFILL_INSTANCE = "starmesh.prefill_instance"
DECODE_INSTANCE = "starmesh.decode_instance"
SOURCE_INSTANCE = "starmesh.source_instance"
TARGET_INSTANCE = "starmesh.target_instance"
POLICY = "starmesh.dispatch_policy"
TRANSFER_BACKEND = "starmesh.transfer_backend"
TRANSFER_BYTES = "starmesh.transfer_bytes"
TRANSFER_BLOCKS = "starmesh.transfer_blocks"
QUEUE_S = "starmesh.queue_s"
RECOVERIES = "starmesh.recoveries"
LOST_INSTANCE = "starmesh.lost_instance"
DRAINED_INSTANCE = "starmesh.drained_instance"
MIGRATIONS = "starmesh.migrations"
MIGRATION_REASON = "starmesh.migration_reason"
MIGRATION_OUTCOME = "starmesh.migration_outcome"
MIGRATION_CAUSE = "starmesh.migration_cause"
MIGRATION_ROUNDS = "starmesh.migration_rounds"
MIGRATION_FROZEN_S = "starmesh.migration_frozen_s"
RESCHEDULING_POLICY = "starmesh.rescheduling_policy"
LEADER_TERM = "starmesh.leader_term"
INSTANCES = "starmesh.instances"
SKIPPED = "starmesh.skipped"  # and a dot and the reason: how many instances or sequences
SPREAD_BEFORE_TOKENS = "starmesh.spread_before_tokens"
SPREAD_AFTER_TOKENS = "starmesh.spread_after_tokens"
SAMPLES = "starmesh.samples"
REQUESTS = "starmesh.requests"
SEQUENCES = "starmesh.sequences"
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
MODEL = "gen_ai.request.model"
MAX_TOKENS = "gen_ai.request.max_tokens"
TEMPERATURE = "gen_ai.request.temperature"
TOP_P = "gen_ai.request.top_p"
TOP_K = "gen_ai.request.top_k"
SEED = "gen_ai.request.seed"
OUTPUT_TYPE = "gen_ai.output.type"
RESPONSE_MODEL = "gen_ai.response.model"
FINISH_REASONS = "gen_ai.response.finish_reasons"
TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS = "gen_ai.usage.input_tokens"
CACHED_TOKENS = "gen_ai.usage.cache_read.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
ERROR_TYPE = "error.type"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
VERSION = "starmesh.version"
KIND = "starmesh.kind"
REASON = "starmesh.reason"
FINISHED = "starmesh.finished"
PROGRESS = "starmesh.progress"  # the part of a request's output, as FROM-TO

# Attributes of metrics: few values each, never a request's id.
TOKEN_TYPE = "gen_ai.token.type"  # noqa: S105 - not a password
OUTCOME = "starmesh.outcome"
ROLE = "starmesh.role"
STATE = "starmesh.state"
QUANTILE = "starmesh.quantile"
DIRECTION = "starmesh.direction"
CACHED = "starmesh.cached"
WHEN = "starmesh.when"  # before or after
LEDGER_OPERATION = "starmesh.ledger_operation"
