"""The compose project that is checked: its containers, the `starmesh` command in it, its published HTTP pages.

Owns how things are asked. What should come of it is ``steps``'s.
"""

import http.client
import json
import os
import ssl
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
PROJECT = "starmesh-check"
WAIT_S = 600.0
UP_TIMEOUT_S = 1800.0  # the image is built, and the model fetched
STOP_S = 45
PROMPT = "Explain in detail why the sky is blue."
OUTPUT_TOKENS = 96
READY = "INSTANCE_STATE_READY"
DRAINED = "INSTANCE_STATE_DRAINED"


class CheckFailed(Exception):
    """Something that the cluster should do and did not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Where the project publishes what, on 127.0.0.1. Not where a cluster of yours does."""

    grpc: int = 50151
    http: int = 8100
    jaeger: int = 16786
    prometheus: int = 9190
    grafana: int = 3100

    def environment(self) -> dict[str, str]:
        """As docker-compose.yml wants them."""
        return {
            "STARMESH_PORT": str(self.grpc),
            "STARMESH_HTTP_PORT": str(self.http),
            "STARMESH_JAEGER_PORT": str(self.jaeger),
            "STARMESH_PROMETHEUS_PORT": str(self.prometheus),
            "STARMESH_GRAFANA_PORT": str(self.grafana),
        }


@dataclass(slots=True, kw_only=True)
class Cluster:
    """``command`` is compose with its files. ``secure`` after docker-compose.tls.yml."""

    command: list[str]
    environment: dict[str, str]
    secure: bool = False
    ports: Ports = field(default_factory=Ports)
    api_key: str = ""
    ca: str = ""
    """The mesh's CA, in PEM."""

    def compose(self, *arguments: str, check: bool = True, timeout_s: float = WAIT_S) -> str:
        """What compose printed. Raises subprocess.SubprocessError when it takes too long or, with ``check``, fails."""
        return self._run([*self.command, *arguments], check=check, timeout_s=timeout_s)

    def docker(self, *arguments: str, check: bool = True, timeout_s: float = WAIT_S) -> str:
        """The same of docker."""
        return self._run(["docker", *arguments], check=check, timeout_s=timeout_s)

    def _run(self, command: list[str], *, check: bool, timeout_s: float) -> str:
        environment = self.environment | {"STARMESH_API_KEY": self.api_key}
        done = subprocess.run(
            command, env=environment, check=check, timeout=timeout_s, capture_output=True, text=True, errors="replace"
        )
        return done.stdout

    def cli(self, *arguments: str) -> str:
        """What `starmesh` printed, in the router's container."""
        environment = ["--env", "COLUMNS=110", "--env", "STARMESH_API_KEY"]
        return self.compose("exec", "-T", *environment, "router", "starmesh", *arguments).strip()

    def make_key(self) -> None:
        """Make an API key for everything, and get the CA. Only where it is ``secure``."""
        keys = "/run/starmesh/keys/api-keys.jsonl"
        once = ["run", "--rm", "--no-deps", "secrets"]
        scopes = ["--scope", "generate", "--scope", "operate"]
        self.api_key = self.compose(*once, "starmesh", "keys", "create", keys, "check", *scopes).strip()
        self.ca = self.compose(*once, "cat", "/run/starmesh/mesh/ca.crt")

    def container(self, instance_id: str) -> str:
        """The container of an instance: ROLE-NUMBER is its id, PROJECT-ROLE-NUMBER its container's name."""
        return f"{PROJECT}-{instance_id}"

    def generate(self) -> "subprocess.Popen[str]":
        """Start a stream as a client on this machine would: through the published port."""
        image = self.docker("inspect", "--format", "{{.Config.Image}}", self.container("router-1")).strip()
        login = ["--env", "STARMESH_API_KEY"]
        if self.secure:
            mesh = "/run/starmesh/mesh"
            login += ["--volume", f"{PROJECT}_mesh:{mesh}:ro", "--env", f"STARMESH_TLS_CA={mesh}/ca.crt"]
        command = ["docker", "run", "--rm", "--network", "host", *login, image, "starmesh", "generate", "--quiet"]
        sampling = ["--temperature", "0", "--ignore-eos", "--max-output-tokens", str(OUTPUT_TOKENS)]
        return subprocess.Popen(
            [*command, "--address", f"127.0.0.1:{self.ports.grpc}", *sampling, PROMPT],
            env=self.environment | {"STARMESH_API_KEY": self.api_key},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, stream: "subprocess.Popen[str]") -> str:
        """The whole text of a stream. Raises CheckFailed when it broke."""
        text, errors = stream.communicate(timeout=WAIT_S)
        if stream.returncode != 0 or not text.strip():
            raise CheckFailed(f"a stream broke: {errors.strip()}")
        return text.strip()

    def decodes(self) -> dict[str, Any]:
        """The decode instances by id, as `starmesh status --json` shows them."""
        instances = json.loads(self.cli("status", "--json"))["instances"]
        return {one["instance_id"]: one for one in instances if one["role"] == "ROLE_DECODE"}

    def busy_decode(self) -> str:
        """Id of a decode instance with a sequence, empty without one."""
        busy = [name for name, one in self.decodes().items() if one.get("load", {}).get("running_sequences")]
        return busy[0] if busy else ""

    def fresh(self) -> list[str]:
        """Ids of the decode instances that are ready and have decoded nothing since they started."""
        ready = {name: one for name, one in self.decodes().items() if one["state"] == READY}
        return [name for name, one in ready.items() if "load" in one and not int(one["load"]["output_tokens"])]

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """The first value of ``condition`` that is true. Raises CheckFailed when none is for WAIT_S."""
        deadline_s = time.monotonic() + WAIT_S
        while not (value := condition()):
            if time.monotonic() > deadline_s:
                raise CheckFailed(f"waited {WAIT_S:g} s in vain for {what}")
            time.sleep(0.5)
        return value

    def get(self, port: int, path: str, **query: str) -> Any:
        """The JSON of a page that this machine's loopback has."""
        with self._answer(port, "GET", path + ("?" + urllib.parse.urlencode(query) if query else "")) as answer:
            return json.loads(answer.read())

    def ask(self, prompt: str) -> tuple[str, str]:
        """The answer to a chat message by HTTP, and the request's id. Raises CheckFailed for an error."""
        model = self.get(self.ports.http, "/v1/models")["data"][0]["id"]
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 24, "temperature": 0}
        with self._answer(self.ports.http, "POST", "/v1/chat/completions", json.dumps(body)) as answer:
            text = json.loads(answer.read())["choices"][0]["message"]["content"]
            return text, answer.headers["x-request-id"]

    @contextmanager
    def _answer(self, port: int, method: str, path: str, body: str | None = None) -> Iterator[http.client.HTTPResponse]:
        connection: http.client.HTTPConnection
        if self.secure and port == self.ports.http:
            context = ssl.create_default_context(cadata=self.ca)
            connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=WAIT_S, context=context)
        else:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        headers = {"content-type": "application/json"} | (
            {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        )
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            if answer.status >= http.client.BAD_REQUEST:
                raise CheckFailed(f"{method} {path} on port {port}: {answer.status} {answer.read()[:200]!r}")
            yield answer
        finally:
            connection.close()


def plain_environment() -> dict[str, str]:
    """This process's environment, for a project of its own and for lines that a log takes."""
    return {**os.environ, **Ports().environment(), "COMPOSE_PROJECT_NAME": PROJECT, "COMPOSE_ANSI": "never"}
