"""The Kubernetes manifests are valid, by the strict schemas of the oldest and the newest version that they are for."""

from __future__ import annotations

from pathlib import Path

import kubernetes_validate
import pytest

from tests.deploy import manifests as k8s

OLDEST = "1.30"
NEWEST = "1.37"


@pytest.mark.parametrize("manifest", k8s.plain(), ids=k8s.name_of)
def test_files_are_valid_as_they_are(manifest: k8s.Manifest) -> None:
    kubernetes_validate.validate(manifest, NEWEST, strict=True)


@pytest.mark.parametrize("overlay", k8s.OVERLAYS)
def test_what_is_rendered_is_valid(overlay: str, tmp_path: Path) -> None:
    for manifest in k8s.render(overlay, tmp_path):
        kubernetes_validate.validate(manifest, OLDEST, strict=True)
