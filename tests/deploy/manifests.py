"""The Kubernetes manifests: as files, and as kustomize renders them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

KUBERNETES: Final = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS: Final = ("cpu", "gpu")
WORKLOADS: Final = ("Deployment", "StatefulSet")
Manifest = dict[str, Any]


def read(path: Path) -> list[Manifest]:
    """The documents of a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def plain() -> list[Manifest]:
    """All manifests that are files of their own, none of which needs rendering to be valid."""
    files = [*sorted((KUBERNETES / "base").glob("*.yaml")), KUBERNETES / "components/autoscaling/autoscalers.yaml"]
    return [manifest for file in files if file.name != "kustomization.yaml" for manifest in read(file)]


def render(overlay: str, directory: Path) -> list[Manifest]:
    """What ``kubectl apply -k`` would send for an overlay, with secrets that are none. Skips the test where neither
    kubectl nor kustomize is installed."""
    command = next((line for line in (["kubectl", "kustomize"], ["kustomize", "build"]) if shutil.which(line[0])), None)
    if command is None:
        pytest.skip("neither kubectl nor kustomize is installed, so overlays cannot be rendered")
    copied = shutil.copytree(KUBERNETES, directory / "kubernetes", ignore=shutil.ignore_patterns("secrets"))
    kustomization = yaml.safe_load((copied / "overlays" / overlay / "kustomization.yaml").read_text())
    for generator in kustomization["secretGenerator"]:
        for entry in generator["files"]:
            file = copied / "overlays" / overlay / entry.rpartition("=")[2]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("none\n")
    done = subprocess.run(
        [*command, str(copied / "overlays" / overlay)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def of_kind(manifests: list[Manifest], *kinds: str) -> Iterator[Manifest]:
    """Those of some kinds."""
    return (manifest for manifest in manifests if manifest["kind"] in kinds)


def name_of(manifest: Manifest) -> str:
    """For messages: kind and name."""
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def pod_of(workload: Manifest) -> Manifest:
    """The pod's template."""
    template: Manifest = workload["spec"]["template"]
    return template


def matches(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a selector, of a Service or a label selector, takes a pod with ``labels``."""
    if "matchLabels" not in selector and "matchExpressions" not in selector:
        return selector.items() <= labels.items()
    expressions = selector.get("matchExpressions", ())
    assert all(expression["operator"] == "In" for expression in expressions)
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


def environment_of(container: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """What a container's environment is, references to other objects filled in; the pod's own as an example."""
    maps = {manifest["metadata"]["name"]: manifest["data"] for manifest in of_kind(manifests, "ConfigMap")}
    environment: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        environment |= maps[source["configMapRef"]["name"]]
    pod = {"metadata.name": "pod-0", "status.podIP": "10.0.0.7"}
    for variable in container.get("env", ()):
        value = variable.get("value")
        if value is None:
            value = pod[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        for name, earlier in environment.items():
            value = value.replace(f"$({name})", earlier)
        environment[variable["name"]] = value
    return environment
