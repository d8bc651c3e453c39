"""What is tried on a cluster that is up, one after the other. Each step raises CheckFailed when it does not hold."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from checking.cluster import DRAINED, PROMPT, READY, STOP_S, CheckFailed, Cluster

Say = Callable[[str], None]

TRACED = {
    "starmesh-router": "starmesh.generate",
    "starmesh-prefill": "starmesh.prefill",
    "starmesh-decode": "starmesh.decode",
}
"""Services that a request's one trace must go through, and the span of each that ends last."""
REQUESTS = "starmesh_requests_total"
SERVICES = ("router", "prefill", "decode", "rescheduler", "predictor")


def answer_over_http(cluster: Cluster, say: Say) -> str:
    """A prompt answered through the published HTTP port. Returns the request's id."""
    text, request_id = cluster.ask(PROMPT)
    if not text.strip():
        raise CheckFailed("the answer over HTTP is empty")
    say(f"answered over HTTP at 127.0.0.1:{cluster.ports.http}, request {request_id}: {text[:60]!r}...")
    return request_id


def find_trace(cluster: Cluster, say: Say, request_id: str, *, jaeger: bool) -> None:
    """One trace of the request that went through router, prefill and decode instance."""

    def in_jaeger() -> dict[str, list[str]]:
        found = cluster.get(
            cluster.ports.jaeger,
            "/api/traces",
            service="starmesh-router",
            tags=json.dumps({"starmesh.request_id": request_id}),
        )
        by_service: dict[str, list[str]] = {}
        for trace in found.get("data") or []:
            for span in trace["spans"]:
                service = trace["processes"][span["processID"]]["serviceName"]
                by_service.setdefault(service, []).append(span["operationName"])
        return by_service

    def in_receiver() -> dict[str, list[str]]:
        lines = cluster.compose("logs", "--no-log-prefix", "spans").splitlines()
        spans = [json.loads(line) for line in lines if line.startswith("{")]
        traces = {span["trace"] for span in spans if span["request"] == request_id}
        by_service: dict[str, list[str]] = {}
        for span in spans:
            if span["trace"] in traces:
                by_service.setdefault(span["service"], []).append(span["name"])
        return by_service

    look = in_jaeger if jaeger else in_receiver

    def whole() -> dict[str, list[str]]:
        found = look()
        return found if all(span in found.get(service, ()) for service, span in TRACED.items()) else {}

    services = cluster.wait_for(whole, f"a trace of request {request_id} through {', '.join(sorted(TRACED))}")
    where = "Jaeger" if jaeger else "an OTLP receiver of this script's (Jaeger itself was not tried)"
    say(f"its trace is in {where}: " + "; ".join(f"{name}: {', '.join(spans)}" for name, spans in services.items()))


def read_metric(cluster: Cluster, say: Say, *, prometheus: bool) -> None:
    """The router's count of requests, by Prometheus or from its page; and that every service has a page."""
    if prometheus:

        def value(query: str) -> float:
            result = cluster.get(cluster.ports.prometheus, "/api/v1/query", query=query)["data"]["result"]
            return float(result[0]["value"][1]) if result else 0.0

        containers = len(cluster.compose("ps", "--quiet", *SERVICES).split())
        scraped = f'count(up{{job=~"{"|".join(SERVICES)}"}} == 1)'
        cluster.wait_for(lambda: value(scraped) >= containers, f"Prometheus to scrape {containers} containers")
        requests = cluster.wait_for(lambda: value(f"sum({REQUESTS})"), f"{REQUESTS} in Prometheus")
        rules = cluster.get(cluster.ports.prometheus, "/api/v1/rules")["data"]["groups"]
        alerts = sum(len(group["rules"]) for group in rules)
        say(f"Prometheus scrapes {containers} containers, has {alerts} rules and says {REQUESTS} {requests:g}")
        return
    for service in SERVICES:
        page = _page(cluster, service)
        if not page.startswith("# HELP"):
            raise CheckFailed(f"the metrics page of {service} is {page[:80]!r}")
    counts = [line for line in _page(cluster, "router").splitlines() if line.startswith(REQUESTS)]
    if not counts:
        raise CheckFailed(f"the router's page has no {REQUESTS}")
    say(f"every service has a page with metrics (Prometheus itself was not tried); the router's: {counts[0]}")


def _page(cluster: Cluster, service: str) -> str:
    read = "from urllib.request import urlopen; print(urlopen('http://127.0.0.1:9464/metrics').read().decode())"
    return cluster.compose("exec", "-T", service, "python", "-c", read)


def see_dashboards(cluster: Cluster, say: Say) -> None:
    """Grafana shows what it was provisioned with."""
    found = cluster.wait_for(lambda: cluster.get(cluster.ports.grafana, "/api/search", type="dash-db"), "dashboards")
    say("Grafana has " + ", ".join(sorted(one["title"] for one in found)))


def kill_decode(cluster: Cluster, say: Say, undisturbed: str) -> None:
    """An instance that dies under a stream does not end it, and is started again."""
    stream = cluster.generate()
    victim = cluster.wait_for(cluster.busy_decode, "an instance that decodes the stream")
    # -1 is all processes but PID 1 and the killer: as if the service had crashed, so that it is started again.
    cluster.docker("exec", cluster.container(victim), "sh", "-c", "kill -9 -1", check=False)
    say(f"killed {victim} under a stream")
    _same(cluster.finish(stream), undisturbed, "over the killed instance")
    say("its stream went on elsewhere, same text")
    cluster.wait_for(lambda: victim in cluster.fresh(), "the killed instance to come back")
    say(f"{victim} was started again and is ready")


def drain_decode(cluster: Cluster, say: Say, undisturbed: str) -> None:
    """A drained instance gives its stream away unbroken."""
    stream = cluster.generate()
    victim = cluster.wait_for(cluster.busy_decode, "an instance that decodes the stream")
    say(cluster.cli("drain", victim).replace("\n", "; "))
    _same(cluster.finish(stream), undisturbed, "over the drained instance")
    if cluster.decodes()[victim]["state"] != DRAINED:
        raise CheckFailed(f"{victim} does not show as drained")
    _same(cluster.finish(cluster.generate()), undisturbed, "of the instance that is left")
    say("its stream ended unbroken, and the other instance answers on")


def restart_decodes(cluster: Cluster, say: Say, undisturbed: str, *, streams: int) -> None:
    """Every decode instance is stopped and started, one at a time, under streams none of which breaks."""

    def readiness(item: tuple[str, Any]) -> bool:
        return bool(item[1]["state"] == READY)

    # One that was drained takes nothing until it is restarted, so it is the first.
    for name, _ in sorted(cluster.decodes().items(), key=readiness):
        running = [cluster.generate() for _ in range(streams)]
        cluster.wait_for(cluster.busy_decode, "an instance that decodes the streams")
        cluster.docker("restart", "-t", str(STOP_S), cluster.container(name))
        cluster.wait_for(partial(_back, cluster, name), f"{name} to come back")
        for stream in running:
            _same(cluster.finish(stream), undisturbed, f"over the restart of {name}")
        say(f"{name} was restarted under {streams} streams, all of them unbroken")


def _back(cluster: Cluster, name: str) -> bool:
    return name in cluster.fresh()


def _same(text: str, undisturbed: str, what: str) -> None:
    if text != undisturbed:
        raise CheckFailed(f"the stream {what} has another text than the undisturbed one")
