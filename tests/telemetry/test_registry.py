"""The registry of metrics: consistent in itself, and what is made of it is current."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.metrics import NoOpMeterProvider

from starmesh.telemetry import instruments, names
from starmesh.telemetry.registry import METRICS, reference, router
from starmesh.telemetry.registry.metric import Kind, Metric
from starmesh.types import Role

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
GRAFANA, PROMETHEUS = ROOT / "deploy" / "grafana", ROOT / "deploy" / "prometheus"
SERIES = {series: row for row in METRICS for series in row.series}
# What Prometheus itself knows of a target.
OF_PROMETHEUS = {"up"}
LABELS_OF_ALL = {"job", "instance", "service_instance_id", "le"}
_NAME = re.compile(r"\b(?:up|(?:starmesh|gen_ai)_\w+)\b")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")
_STRINGS = re.compile(r'"[^"]*"')


def test_each_metric_is_there_once() -> None:
    assert len({row.name for row in METRICS}) == len({row.prometheus_name for row in METRICS}) == len(METRICS)


@pytest.mark.parametrize("row", METRICS, ids=lambda row: row.name)
def test_a_row_is_whole(row: Metric) -> None:
    assert re.fullmatch(r"(starmesh|gen_ai\.server)(\.[a-z_]+)+", row.name)
    assert row.roles and re.fullmatch(r"[A-Z1].*\.", row.description)
    assert set(row.attributes) <= {value for key, value in vars(names).items() if key.isupper()}
    assert names.REQUEST_ID not in row.attributes
    assert list(row.buckets) == sorted(set(row.buckets))


def test_names_are_as_prometheus_has_them() -> None:
    assert router.REQUESTS.prometheus_name == "starmesh_requests_total"
    assert router.TIME_TO_FIRST_TOKEN.series[0] == "gen_ai_server_time_to_first_token_seconds_bucket"
    assert router.CLUSTER_INSTANCES.labels == ("starmesh_role", "starmesh_state")


def test_a_row_that_cannot_be_is_refused() -> None:
    def row(**fields: Any) -> Metric:
        given: dict[str, Any] = {
            "name": "starmesh.x",
            "kind": Kind.COUNTER,
            "unit": "s",
            "description": "X.",
            "roles": (Role.ROUTER,),
        }
        return Metric(**(given | fields))

    with pytest.raises(ValueError, match="nothing else has"):
        row(buckets=(1.0,))
    with pytest.raises(ValueError, match="nothing else has"):
        row(kind=Kind.HISTOGRAM)
    with pytest.raises(ValueError, match="unit 'ms'"):
        row(unit="ms")
    with pytest.raises(ValueError, match=r"starmesh\.x is a counter"):
        instruments.gauge(NoOpMeterProvider().get_meter("test"), row(), list)


def test_the_page_of_the_docs_is_current() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    told = "run `python -m starmesh.telemetry.registry.reference docs/metrics.md`"
    assert page == reference.updated(page), told
    with pytest.raises(ValueError, match="has no"):
        reference.updated("# Metrics")


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The dashboards as files of JSON, by name; what makes them must make them so."""
    monkeypatch.syspath_prepend(GRAFANA)
    from boards.dashboards import DASHBOARDS  # type: ignore[import-not-found]
    from boards.document import text  # type: ignore[import-not-found]

    made = {f"{dashboard.uid}.json": text(dashboard) for dashboard in DASHBOARDS}
    found = {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()}
    assert made == found, "run `python deploy/grafana/build`"
    return {name: json.loads(content) for name, content in found.items()}


def test_dashboards_show_what_is_registered_and_all_of_it(boards: dict[str, dict[str, Any]]) -> None:
    shown: set[str] = set()
    for board in boards.values():
        variables = {variable["name"] for variable in board["templating"]["list"]} | {"__rate_interval"}
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                check_names(target["expr"], legend=target["legendFormat"])
                shown |= {SERIES[name].name for name in named(target["expr"])}
                assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
    assert shown == {row.name for row in METRICS}


def test_panels_have_places_and_numbers_of_their_own(boards: dict[str, dict[str, Any]]) -> None:
    for board in boards.values():
        places: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            grid = panel["gridPos"]
            covered = {
                (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
            }
            assert max(x for x, _ in covered) < 24 and not places & covered
            places |= covered
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        assert all("targets" in panel for panel in board["panels"] if panel["type"] != "row")


def test_grafana_finds_what_its_dashboards_ask(boards: dict[str, dict[str, Any]]) -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "starmesh.yml").read_text())["datasources"]
    uids = {source["uid"] for source in sources}
    asked = {
        panel["datasource"]["uid"] for board in boards.values() for panel in board["panels"] if "datasource" in panel
    }
    assert asked <= uids == {"prometheus", "jaeger"}
    providers = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "starmesh.yml").read_text())["providers"]
    compose = yaml.safe_load((ROOT / "deploy" / "docker-compose.yml").read_text())
    mounts = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == providers[0]["options"]["path"]


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_registered(rule: dict[str, Any]) -> None:
    check_names(rule["expr"])
    assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description"}
    # A label that the expression has dropped would be empty in the text.
    kept = labels_left(rule["expr"])
    told = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    assert told <= kept


def test_prometheus_scrapes_every_service_of_the_composition() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job["dns_sd_configs"][0] for job in config["scrape_configs"]}
    assert jobs.keys() == {role.value for role in Role}
    compose = yaml.safe_load((ROOT / "deploy" / "docker-compose.yml").read_text())
    assert jobs.keys() <= compose["services"].keys()
    for name, found in jobs.items():
        assert found["names"] == [name] and found["type"] == "A"
        port = compose["services"][name]["environment"]["STARMESH_METRICS_LISTEN"].rpartition(":")[2]
        assert found["port"] == int(port)


def named(expr: str) -> set[str]:
    """The metrics that an expression names."""
    bare = _GROUPED.sub("", _STRINGS.sub("", expr))
    return set(_NAME.findall(re.sub(r"\{[^}]*\}", "", bare))) - OF_PROMETHEUS


def check_names(expr: str, *, legend: str = "") -> None:
    """Every metric is registered, and every label one of its own."""
    found = named(expr)
    assert found <= SERIES.keys(), f"not registered: {found - SERIES.keys()}"
    known = LABELS_OF_ALL.union(*(SERIES[name].labels for name in found))
    used = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|!~|=)", _STRINGS.sub('""', expr)))
    for group in _GROUPED.findall(expr):
        used |= {label.strip() for label in group.split(",")}
    used |= set(re.findall(r"\{\{(\w+)\}\}", legend))
    assert used <= known, f"{expr}: no label of these: {used - known}"


def labels_left(expr: str) -> set[str]:
    """The labels that the result has."""
    groups = _GROUPED.findall(expr)
    if groups:
        return {label.strip() for label in groups[0].split(",")}
    if re.search(r"\bsum\(", expr):
        return set()
    return LABELS_OF_ALL
