"""Which dashboards there are, and what is on them: every metric of the registry once at least, as a test demands.

``$instance`` chooses among prefill and decode instances.
"""

from __future__ import annotations

from typing import Final

from boards.panels import INSTANCE, Curve, Dashboard, Panel, level, mean, part, quantile, quantiles, rate
from starmesh.telemetry.registry import decode, instance, ledger, predictor, prefill, rescheduler, router, tls

CHOSEN: Final = 'service_instance_id=~"$instance"'
DECODES: Final = f'job="decode", {CHOSEN}'
PREFILLS: Final = f'job="prefill", {CHOSEN}'

DASHBOARDS: Final = (
    Dashboard(
        "starmesh-requests",
        "starmesh: requests",
        (
            (
                "What clients see",
                (
                    quantiles(router.TIME_TO_FIRST_TOKEN, title="TTFT"),
                    quantiles(router.TIME_PER_OUTPUT_TOKEN, title="TPOT"),
                    quantiles(router.INTER_TOKEN_LATENCY, (0.5, 0.99, 0.999), title="ITL"),
                    quantiles(router.REQUEST_DURATION, title="end to end"),
                    rate(router.REQUESTS, ("starmesh_outcome",), title="requests per second, by outcome"),
                    rate(router.REFUSED_CALLS, ("error_type",), title="calls refused per second, by status"),
                    rate(instance.OUTPUT_TOKENS, (), 'job="decode"', title="output tokens per second"),
                ),
            ),
            (
                "In flight",
                (
                    level(router.ACTIVE_REQUESTS, (INSTANCE,), title="requests in flight"),
                    level(router.QUEUED_REQUESTS, (INSTANCE,), title="requests that wait for room"),
                    level(router.DETACHED_REQUESTS, ("starmesh_state",), title="requests whose client is away"),
                    quantiles(router.QUEUE_DURATION, title="wait for dispatch"),
                    quantile(router.REQUEST_TOKENS, 0.5, ("gen_ai_token_type",), title="median tokens of a request"),
                    quantile(router.REQUEST_TOKENS, 0.99, ("gen_ai_token_type",), title="P99 of tokens of a request"),
                    rate(router.RECOVERIES, (INSTANCE,), title="recoveries per second"),
                ),
            ),
            (
                "The cluster",
                (
                    Panel(
                        "instances, as routers see them",
                        "short",
                        router.CLUSTER_INSTANCES.description,
                        (
                            Curve(
                                f"max by (starmesh_role, starmesh_state) ({router.CLUSTER_INSTANCES.prometheus_name})",
                                "{{starmesh_role}} {{starmesh_state}}",
                            ),
                        ),
                    ),
                    quantile(ledger.LEDGER_DURATION, 0.99, ("starmesh_ledger_operation",), title="P99 of the ledger"),
                    rate(ledger.LEDGER_ERRORS, ("job", "error_type"), title="ledger errors per second"),
                    Panel(
                        "time until certificates end",
                        "s",
                        tls.CERTIFICATE_EXPIRES.description,
                        (
                            Curve(
                                f"min by ({INSTANCE}) ({tls.CERTIFICATE_EXPIRES.prometheus_name}) - time()",
                                f"{{{{{INSTANCE}}}}}",
                            ),
                        ),
                    ),
                ),
            ),
        ),
    ),
    Dashboard(
        "starmesh-instances",
        "starmesh: instances",
        (
            (
                "Decode: load",
                (
                    part(
                        "KV in use",
                        instance.KV_USED_BLOCKS,
                        instance.KV_TOTAL_BLOCKS,
                        (INSTANCE,),
                        DECODES,
                    ),
                    level(instance.RESIDENT_TOKENS, (INSTANCE,), DECODES, title="resident tokens"),
                    level(
                        decode.PREDICTED_TOKENS,
                        (INSTANCE, "starmesh_quantile"),
                        CHOSEN,
                        title="tokens predicted to come",
                    ),
                    level(
                        instance.SEQUENCES,
                        (INSTANCE, "starmesh_state"),
                        DECODES,
                        title="sequences, running and waiting",
                    ),
                    rate(instance.PREEMPTIONS, (INSTANCE,), DECODES, title="preemptions per second"),
                    level(instance.INSTANCE_STATE, (INSTANCE, "starmesh_state"), CHOSEN, title="state"),
                ),
            ),
            (
                "Decode: steps",
                (
                    quantile(instance.STEP_DURATION, 0.5, (INSTANCE,), DECODES, title="median step"),
                    quantile(instance.STEP_DURATION, 0.99, (INSTANCE,), DECODES, title="P99 of steps"),
                    mean(instance.STEP_SEQUENCES, (INSTANCE,), DECODES, title="mean batch"),
                    rate(instance.OUTPUT_TOKENS, (INSTANCE,), DECODES, title="output tokens per second"),
                    quantiles(decode.HANDOFF_DURATION, title="handoff"),
                    rate(
                        decode.TRANSFER_BYTES,
                        (INSTANCE, "starmesh_transfer_backend"),
                        CHOSEN,
                        title="KV pulled, by backend",
                    ),
                    quantile(decode.TRANSFER_DURATION, 0.9, ("starmesh_transfer_backend",), title="P90 of pulls"),
                    rate(decode.TRANSFER_FAILURES, (INSTANCE,), CHOSEN, title="failed pulls per second"),
                ),
            ),
            (
                "Prefill",
                (
                    quantiles(prefill.PREFILL_DURATION, title="prefill"),
                    quantiles(prefill.PREFILL_WAIT, title="wait before the first step"),
                    rate(prefill.PREFILL_TOKENS, ("starmesh_cached",), title="prompt tokens, cached and computed"),
                    part(
                        "KV in use",
                        instance.KV_USED_BLOCKS,
                        instance.KV_TOTAL_BLOCKS,
                        (INSTANCE,),
                        PREFILLS,
                    ),
                    level(prefill.KV_LEASES, (INSTANCE,), CHOSEN, title="sequences that wait to be pulled"),
                    quantile(instance.STEP_DURATION, 0.9, (INSTANCE,), PREFILLS, title="P90 of steps"),
                ),
            ),
        ),
        chosen=True,
    ),
    Dashboard(
        "starmesh-balance",
        "starmesh: balance",
        (
            (
                "Rescheduling",
                (
                    level(rescheduler.SPREAD, ("starmesh_when",), title="spread of load over decode instances"),
                    rate(
                        rescheduler.PLANNED_MIGRATIONS, ("starmesh_migration_reason",), title="migrations commanded /s"
                    ),
                    rate(rescheduler.ENDED_MIGRATIONS, ("starmesh_outcome",), title="and what became of them /s"),
                    rate(rescheduler.SKIPPED_SEQUENCES, ("starmesh_reason",), title="why sequences stay /s"),
                    rate(rescheduler.SKIPPED_INSTANCES, ("starmesh_reason",), title="instances left out /s"),
                    level(rescheduler.ACTIVE_MIGRATIONS, (INSTANCE,), title="commanded and under way"),
                    level(rescheduler.LEADER, (INSTANCE,), title="who leads"),
                    rate(rescheduler.ROUNDS, (INSTANCE, "starmesh_outcome"), title="rounds per second"),
                    quantiles(rescheduler.ROUND_DURATION, title="a leader's round"),
                ),
            ),
            (
                "Migrations",
                (
                    rate(
                        decode.MIGRATIONS,
                        ("starmesh_migration_reason", "starmesh_migration_outcome"),
                        title="migrations per second",
                    ),
                    rate(
                        decode.MIGRATIONS,
                        ("starmesh_migration_cause",),
                        'starmesh_migration_outcome!="moved"',
                        title="why sequences did not move /s",
                    ),
                    level(decode.ACTIVE_MIGRATIONS, (INSTANCE, "starmesh_direction"), title="under way"),
                    quantiles(decode.MIGRATION_GAP, (0.5, 0.9, 0.99), title="standing still (gap)"),
                    quantiles(decode.MIGRATION_DURATION, title="from command to end"),
                    quantile(decode.MIGRATION_ROUNDS, 0.9, (), title="P90 of copy rounds"),
                    rate(decode.MIGRATION_BYTES, (INSTANCE,), title="KV moved, by source"),
                ),
            ),
        ),
    ),
    Dashboard(
        "starmesh-prediction",
        "starmesh: prediction",
        (
            (
                "How well",
                (
                    level(predictor.MAE, ("starmesh_progress",), title="mean absolute error, by progress", how="avg"),
                    level(
                        predictor.COVERAGE,
                        ("starmesh_progress",),
                        title="within the 0.9 quantile, by progress",
                        how="avg",
                    ),
                    level(predictor.ACTIVE_VERSION, ("starmesh_version", "starmesh_kind"), title="what answers"),
                    level(decode.PREDICTION_AGE, (INSTANCE,), title="age of predictions"),
                    level(decode.UNPREDICTED_SEQUENCES, (INSTANCE,), title="sequences without one"),
                    rate(predictor.ENDED_REQUESTS, ("starmesh_finished",), title="ends told per second"),
                ),
            ),
            (
                "How fast",
                (
                    quantiles(predictor.LATENCY, title="answer to a call"),
                    quantiles(predictor.SAMPLE_AGE, title="wait for a forward"),
                    mean(predictor.BATCH_SAMPLES, (INSTANCE,), title="mean samples of a forward"),
                    rate(predictor.PREDICTIONS, (INSTANCE,), title="samples answered per second"),
                    rate(predictor.DROPPED_SAMPLES, ("starmesh_reason",), title="samples left unanswered per second"),
                    level(predictor.QUEUED_SAMPLES, (INSTANCE,), title="samples that wait"),
                    level(predictor.COLLECTED_SAMPLES, (INSTANCE,), title="samples collected"),
                    level(predictor.COLLECTED_BYTES, (INSTANCE,), title="bytes collected"),
                ),
            ),
        ),
    ),
)
