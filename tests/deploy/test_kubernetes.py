"""The Kubernetes manifests are consistent with one another and with the services' settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from starmesh.telemetry.registry import METRICS
from tests.deploy import manifests as k8s
from tests.deploy.settings import SETTINGS, take, unknown_variables

pytestmark = pytest.mark.fast

GRPC_PORT = 50051


@pytest.fixture(scope="module", params=k8s.OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def rendered(overlay: str, tmp_path_factory: pytest.TempPathFactory) -> list[k8s.Manifest]:
    return k8s.render(overlay, tmp_path_factory.mktemp("rendered"))


def _services(manifests: list[k8s.Manifest]) -> list[tuple[str, k8s.Manifest, k8s.Manifest]]:
    """Role, workload and container of each of our services."""
    found = []
    for workload in k8s.of_kind(manifests, *k8s.WORKLOADS):
        role = workload["metadata"]["labels"]["app.kubernetes.io/component"]
        if role in SETTINGS:
            (container,) = k8s.pod_of(workload)["spec"]["containers"]
            found.append((role, workload, container))
    return found


def test_all_services_are_there(rendered: list[k8s.Manifest]) -> None:
    assert {role for role, _, _ in _services(rendered)} == SETTINGS.keys()


def test_every_object_is_in_the_namespace(rendered: list[k8s.Manifest]) -> None:
    (namespace,) = k8s.of_kind(rendered, "Namespace")
    for manifest in rendered:
        if manifest is not namespace:
            assert manifest["metadata"]["namespace"] == namespace["metadata"]["name"], k8s.name_of(manifest)


def test_every_container_is_probed_limited_and_restricted(rendered: list[k8s.Manifest]) -> None:
    for workload in k8s.of_kind(rendered, *k8s.WORKLOADS):
        pod = k8s.pod_of(workload)["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        for container in pod["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= container.keys(), k8s.name_of(workload)
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_images_are_pinned(rendered: list[k8s.Manifest]) -> None:
    for workload in k8s.of_kind(rendered, *k8s.WORKLOADS):
        pod = k8s.pod_of(workload)["spec"]
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert re.fullmatch(r"[\w./-]+:(?!latest$)[\w.-]+", container["image"]), container["image"]


def test_services_start_with_what_they_are_given(
    rendered: list[k8s.Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for role, workload, container in _services(rendered):
        assert container["command"] == ["python", "-m", f"services.{role}"]
        environment = k8s.environment_of(container, rendered)
        # What all share is a setting of one of them; what is a container's own is its service's.
        assert not unknown_variables(set(environment), set(SETTINGS))
        assert not unknown_variables({variable["name"] for variable in container["env"]}, {role})
        with monkeypatch.context() as patch:
            settings = take(role, environment, patch, tmp_path)
        assert settings.listen == f"0.0.0.0:{GRPC_PORT}"
        assert settings.advertise == f"10.0.0.7:{GRPC_PORT}"
        assert settings.instance_id == "pod-0"
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["grpc"] == GRPC_PORT
        assert settings.metrics_listen == f"0.0.0.0:{ports['metrics']}"
        if role == "router":
            assert environment["STARMESH_HTTP_LISTEN"] == f"0.0.0.0:{ports['http']}"
        # Otherwise the kubelet kills what is still moving away.
        pause_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert k8s.pod_of(workload)["spec"]["terminationGracePeriodSeconds"] > settings.grace_s + pause_s


def test_services_of_the_namespace_hide_no_setting(rendered: list[k8s.Manifest]) -> None:
    """For a Service called starmesh the kubelet would set STARMESH_PORT and more of the kind."""
    for _, workload, _ in _services(rendered):
        assert k8s.pod_of(workload)["spec"]["enableServiceLinks"] is False


def test_selectors_and_ports_find_pods(rendered: list[k8s.Manifest]) -> None:
    workloads = list(k8s.of_kind(rendered, *k8s.WORKLOADS))
    for manifest in k8s.of_kind(rendered, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        key = "podSelector" if manifest["kind"] == "NetworkPolicy" else "selector"
        selector = manifest["spec"][key]
        found = [one for one in workloads if k8s.matches(selector, k8s.pod_of(one)["metadata"]["labels"])]
        assert found, f"{k8s.name_of(manifest)} selects nothing"
        if manifest["kind"] == "Service":
            (workload,) = found
            (container,) = k8s.pod_of(workload)["spec"]["containers"]
            for port in manifest["spec"]["ports"]:
                assert port["targetPort"] in {one["name"] for one in container["ports"]}
    for workload in workloads:
        labels = k8s.pod_of(workload)["metadata"]["labels"]
        assert k8s.matches(workload["spec"]["selector"], labels)
        if workload["kind"] == "StatefulSet":
            services = {one["metadata"]["name"] for one in k8s.of_kind(rendered, "Service")}
            assert workload["spec"]["serviceName"] in services


def test_policies_open_the_ports_that_are_served(rendered: list[k8s.Manifest]) -> None:
    containers = {role: container for role, _, container in _services(rendered)}
    for policy in k8s.of_kind(rendered, "NetworkPolicy"):
        opened = {port["port"] for rule in policy["spec"].get("ingress", ()) for port in rule.get("ports", ())}
        served = {
            port["containerPort"]
            for workload in k8s.of_kind(rendered, *k8s.WORKLOADS)
            for container in k8s.pod_of(workload)["spec"]["containers"]
            for port in container["ports"]
        }
        assert opened <= served
    assert containers.keys() == SETTINGS.keys()


def test_claims_secrets_and_mounts_fit_together(rendered: list[k8s.Manifest]) -> None:
    names = {kind: {one["metadata"]["name"] for one in k8s.of_kind(rendered, kind)} for kind in ("Secret", "ConfigMap")}
    claims = {one["metadata"]["name"] for one in k8s.of_kind(rendered, "PersistentVolumeClaim")}
    for workload in k8s.of_kind(rendered, *k8s.WORKLOADS):
        pod = k8s.pod_of(workload)["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        for volume in pod.get("volumes", ()):
            if "secret" in volume:
                assert volume["secret"]["secretName"] in names["Secret"]
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounted.keys() <= volumes
            for name, value in k8s.environment_of(container, rendered).items():
                # A file that a service is told to read is in a volume that it has.
                if value.startswith("/run/") and container in pod["containers"]:
                    assert any(value.startswith(f"{path}/") for path in mounted.values()), name


def test_autoscalers_scale_what_is_there(rendered: list[k8s.Manifest], overlay: str) -> None:
    workloads = {(one["kind"], one["metadata"]["name"]): one for one in k8s.of_kind(rendered, *k8s.WORKLOADS)}
    scalers = list(k8s.of_kind(rendered, "HorizontalPodAutoscaler"))
    assert bool(scalers) == (overlay == "gpu")
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        # A number in the manifest would be set again by each apply.
        assert "replicas" not in workloads[target["kind"], target["name"]]["spec"]


def test_autoscalers_ask_for_what_the_adapter_makes_of_real_metrics() -> None:
    folder = k8s.KUBERNETES / "components" / "autoscaling"
    rules = yaml.safe_load((folder / "adapter-rules.yaml").read_text())["rules"]
    asked: set[str] = set()
    for scaler in k8s.read(folder / "autoscalers.yaml"):
        for metric in scaler["spec"]["metrics"]:
            source: dict[str, Any] = metric[metric["type"].lower()]
            if "metric" in source:
                asked.add(source["metric"]["name"])
    made = {rule["name"]["as"]: rule for kind in ("custom", "external") for rule in rules[kind]}
    assert asked == made.keys()
    gauges = {metric.name.replace(".", "_") for metric in METRICS if metric.unit.startswith("{")}
    for rule in made.values():
        used = set(re.findall(r"starmesh_\w+(?={)", rule["metricsQuery"])) | {rule["seriesQuery"].partition("{")[0]}
        assert used <= gauges


def test_encrypted_clusters_are_encrypted_throughout(rendered: list[k8s.Manifest], overlay: str) -> None:
    for _, _, container in _services(rendered):
        environment = k8s.environment_of(container, rendered)
        assert environment["STARMESH_LEDGER"].startswith("rediss://" if overlay == "gpu" else "redis://")
        assert ("STARMESH_TLS_CERT" in environment) == (overlay == "gpu")
        # The kubelet's gRPC probes speak no TLS.
        probes = [container[name] for name in ("startupProbe", "readinessProbe") if name in container]
        assert all(("exec" if overlay == "gpu" else "grpc") in probe for probe in probes)


def test_no_secret_is_in_a_file() -> None:
    documents = [document for file in k8s.KUBERNETES.rglob("*.yaml") for document in k8s.read(file)]
    assert "Secret" not in {document["kind"] for document in documents if "kind" in document}
    assert "/overlays/*/secrets/" in (k8s.KUBERNETES / ".gitignore").read_text()
