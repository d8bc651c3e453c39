"""The compose files: consistent with .env, with what is on disk and with the services' settings."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy import compose_files as compose
from tests.deploy.settings import SETTINGS, take, unknown_variables

pytestmark = pytest.mark.fast

ONE_SHOT = {"model", "secrets"}
OBSERVABILITY = {"jaeger", "prometheus", "grafana"}
STACKS = pytest.mark.parametrize("files", [(), *((file,) for file in compose.OVERRIDES)], ids="+".join)


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def test_all_services_are_there() -> None:
    assert compose.services().keys() == {*SETTINGS, *OBSERVABILITY, "valkey", "model"}


def test_every_variable_is_in_dotenv_and_used() -> None:
    used: dict[str, bool] = {}
    for file in (compose.BASE, *compose.OVERRIDES):
        used |= compose.variables(file)
    assert {name for name, optional in used.items() if not optional} <= compose.dotenv().keys()
    assert compose.dotenv().keys() <= used.keys()


@STACKS
def test_services_start_with_what_they_are_given(
    files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for role in SETTINGS:
        service = compose.services(*files)[role]
        assert service["command"] == [role]
        environment = {name: str(value) for name, value in service["environment"].items()}
        assert not unknown_variables(set(environment), {role})
        with monkeypatch.context() as patch:
            settings = take(role, environment, patch, tmp_path, "--advertise", "10.0.0.7:50051")
        # Compose kills what has not ended by then.
        assert _seconds(service["stop_grace_period"]) > settings.grace_s
        assert f"127.0.0.1:{settings.listen.rpartition(':')[2]}" in service["healthcheck"]["test"]
        assert (settings.tls_cert is not None) == (files == ("docker-compose.tls.yml",))


@STACKS
def test_every_service_has_health_a_limit_and_no_rights(files: tuple[str, ...]) -> None:
    for name, service in compose.services(*files).items():
        assert service["deploy"]["resources"]["limits"]["memory"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert bool(service["healthcheck"].get("disable")) == (name in ONE_SHOT), name
        assert service["read_only"] or name in OBSERVABILITY if "read_only" in service else name in OBSERVABILITY


@STACKS
def test_what_is_waited_for_is_healthy_or_has_ended_well(files: tuple[str, ...]) -> None:
    services = compose.services(*files)
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
            assert how["condition"] == wanted, name
            assert services[needed].get("profiles", []) in ([], service.get("profiles")), name


@STACKS
def test_what_is_mounted_is_there(files: tuple[str, ...]) -> None:
    volumes = {
        volume for file in (compose.BASE, *files) for volume in compose.read(file, compose.dotenv()).get("volumes", {})
    }
    for service in compose.services(*files).values():
        for source, _, _ in (volume.partition(":") for volume in service.get("volumes", ())):
            assert (compose.DEPLOY / source).exists() if source.startswith(".") else source in volumes


@STACKS
def test_what_services_are_told_to_read_is_mounted(files: tuple[str, ...]) -> None:
    for name, service in compose.services(*files).items():
        mounted = [volume.split(":")[1] for volume in service.get("volumes", ())]
        words = [*service.get("environment", {}).values()] if isinstance(service.get("environment"), dict) else []
        for word in (*words, *service.get("command", ()), *service["healthcheck"].get("test", ())):
            if str(word).startswith("/run/") and name not in ONE_SHOT:
                assert any(str(word).startswith(f"{path}/") for path in mounted), (name, word)


def test_images_are_pinned() -> None:
    for service in compose.services(*compose.OVERRIDES).values():
        assert re.fullmatch(r"[\w./-]+:(?!latest$)[\w.-]+", service["image"]), service["image"]


def test_ports_are_published_on_loopback_alone() -> None:
    published = [port for service in compose.services().values() for port in service.get("ports", ())]
    assert len(published) == 5
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize(("profiles", "endpoint"), [("observability", "http://jaeger:4317"), ("", "")])
def test_traces_go_where_there_is_somebody(profiles: str, endpoint: str) -> None:
    content = compose.read(compose.BASE, compose.dotenv() | {"COMPOSE_PROFILES": profiles})
    assert (content["services"]["router"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] or "") == endpoint


@pytest.mark.parametrize(
    ("role", "found", "gpus", "first", "instance", "device"),
    [
        ("decode", "172.18.0.5 starmesh-decode-3.starmesh_default", "", "", "decode-3", "cpu"),
        ("decode", "", "", "", "decode-3fa2b1c0de42", "cpu"),
        ("decode", "172.18.0.5 starmesh-decode-1.starmesh_default", "4", "1", "decode-1", "cuda:1"),
        ("decode", "172.18.0.5 starmesh-decode-4.starmesh_default", "4", "1", "decode-4", "cuda:0"),
        ("prefill", "172.18.0.5 starmesh-prefill-1.starmesh_default", "4", "", "prefill-1", "cuda:0"),
        ("decode", "", "4", "1", "decode-3fa2b1c0de42", "cuda"),
    ],
)
def test_instances_are_called_after_their_containers(
    role: str, found: str, gpus: str, first: str, instance: str, device: str, tmp_path: Path
) -> None:
    """The shell that starts services, with Docker's DNS and Python replaced."""
    (tmp_path / "getent").write_text(
        '#!/bin/sh\ncase "$1" in hosts) echo "172.18.0.5      $2";; -s) [ -n "$FOUND" ] && echo "$FOUND";; esac\n'
    )
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" "$STARMESH_DEVICE"\n')
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    # Two dollars in a compose file are one.
    command = [word.replace("$$", "$") for word in (*compose.services()[role]["entrypoint"], role)]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOSTNAME": "3fa2b1c0de42", "FOUND": found}
    environment["STARMESH_DEVICE"] = "cuda" if gpus else "cpu"
    environment |= {name: value for name, value in (("GPUS", gpus), ("FIRST_GPU", first)) if value}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [
        *("-m", f"services.{role}", "--instance-id", instance, "--advertise", "172.18.0.5:50051", device)
    ]


def test_the_image_has_no_root_and_gets_what_it_copies() -> None:
    dockerfile = (compose.DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == ["10001:10001"]
    assert "--mount" not in dockerfile  # the classic builder has none
    allowed = (compose.DEPLOY.parent / ".dockerignore").read_text().split()
    copied = re.findall(r"^COPY (?!--from)(.*) \./$", dockerfile, re.MULTILINE)
    for name in (name for names in copied for name in names.split()):
        assert f"!{name}" in allowed
        assert (compose.DEPLOY.parent / name).exists()


def test_a_check_that_was_asked_wrongly_tries_nothing() -> None:
    ran = subprocess.run([compose.DEPLOY / "check", "--tsl"], capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stdout) == (2, "") and "--tsl" in ran.stderr
