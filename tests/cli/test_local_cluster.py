"""The command line against a real cluster that it started itself, used as a person would: by processes and signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

TIMEOUT_S = 180.0


def starmesh(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "starmesh.cli", *arguments]


def until(condition: Callable[[], object], what: str, describe: Callable[[], str] = str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited for {what}: {describe()}"
        time.sleep(0.05)


@dataclass
class Up:
    """A running ``starmesh up``."""

    process: subprocess.Popen[bytes]
    log: Path
    address: str = ""

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str, *, count: int = 1) -> re.Match[str]:
        def found() -> list[re.Match[str]]:
            assert self.process.poll() is None, self.output()
            return list(re.finditer(pattern, self.output()))

        until(lambda: len(found()) >= count, pattern, self.output)
        return found()[-1]

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def service(self, name: str) -> psutil.Process:
        return next(child for child in self.descendants() if name in child.cmdline())


def start_up(log: Path, model: Path, *flags: str) -> Up:
    with log.open("wb") as output:
        command = starmesh("up", "--port", "0", "--model", str(model), "--kv-memory-mib", "16", *flags)
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    return Up(process, log)


def wait_ready(up: Up) -> Up:
    up.address = up.wait_for(r"the cluster is ready at (\S+);")[1]
    return up


def gone(processes: list[psutil.Process]) -> None:
    left: list[psutil.Process] = []

    def none_left() -> bool:
        left[:] = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return not left

    until(none_left, "no process to be left", lambda: str(left))


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Up]:
    directory = tmp_path_factory.mktemp("up")
    up = start_up(directory / "up.log", tiny_model_dir, "--run-dir", str(directory / "run"))
    try:
        yield wait_ready(up)
    finally:
        up.process.kill()
        up.process.wait()


def call(up: Up, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = starmesh(*arguments, "--address", up.address)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == code, done.stdout + done.stderr
    return done


class TestRunningCluster:
    def test_generate_streams_the_answer_alone_to_stdout(self, up: Up) -> None:
        flags = ("--temperature", "0", "--max-output-tokens", "12", "--ignore-eos")
        first = call(up, "generate", "Hello", *flags)
        assert re.search(r"\[12 tokens, cut by its length limit, first after .* s, then .* tokens/s", first.stderr)
        assert call(up, "generate", "Hello", "--quiet", *flags).stdout == first.stdout
        assert call(up, "generate", "Hello", "--raw", *flags).stdout != first.stdout

    def test_the_prompt_may_come_from_a_file(self, up: Up, tmp_path: Path) -> None:
        (tmp_path / "prompt.txt").write_text("Hello")
        flags = ("--temperature", "0", "-n", "4", "--ignore-eos", "--quiet")
        from_file = call(up, "generate", "--file", str(tmp_path / "prompt.txt"), *flags)
        assert from_file.stdout == call(up, "generate", "Hello", *flags).stdout

    def test_status_lists_all_services(self, up: Up) -> None:
        table = call(up, "status").stdout
        names = ["router-0", "prefill-0", "decode-0", "decode-1", "rescheduler-0", "predictor-0"]
        assert all(name in table for name in names)
        instances = json.loads(call(up, "status", "--json").stdout)["instances"]
        assert sorted(instance["instance_id"] for instance in instances) == sorted(names)

    def test_bench_measures_every_request(self, up: Up, tmp_path: Path) -> None:
        prompts, result = tmp_path / "prompts.jsonl", tmp_path / "result.json"
        prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
        flags = ("--requests", "6", "--max-output-tokens", "5", "--ignore-eos", "--json", str(result))
        done = call(up, "bench", str(prompts), "--rate", "20", *flags, "--slo-ttft", "1000", "--slo-tpot", "1000")
        for word in ("TTFT", "TPOT", "ITL", "p50", "p90", "p99", "goodput", "6 good"):
            assert word in done.stdout
        content = json.loads(result.read_text())
        assert (content["requests"], content["output_tokens"], content["good_requests"]) == (6, 30, 6)
        assert content["goodput_requests_per_s"] == content["requests_per_s"] > 0
        closed = call(up, "bench", str(prompts), "--concurrency", "2", *flags, "--slo-ttft", "0")
        assert "0 good" in closed.stdout

    def test_the_predictor_tells_its_state(self, up: Up) -> None:
        up.wait_for("remaining tokens are predicted by ")
        assert "answers with" in call(up, "predictor", "status").stdout
        content = json.loads(call(up, "predictor", "status", "--json").stdout)
        assert content["instance_id"] == "predictor-0"
        done = call(up, "predictor", "promote", "no-such-version", code=1)
        assert done.stderr.startswith("starmesh: version no-such-version is not here; it can be one of ")
        assert done.stderr.count("\n") == 1

    def test_a_running_cluster_answers_a_collection(self, up: Up, tmp_path: Path) -> None:
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
        command = starmesh("predictor", "collect", str(prompts), "--router", up.address, "-n", "30")
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 of 2 requests, 0 finished, 2 cut" in done.stdout
        assert "no sample is stored so far" in done.stdout

    def test_a_bad_value_is_one_line_naming_the_field(self, up: Up) -> None:
        done = call(up, "generate", "Hello", "--temperature", "-1", code=1)
        assert done.stderr.startswith("starmesh: the request is not valid: sampling.temperature")
        assert done.stderr.count("\n") == 1

    def test_an_unknown_instance_does_not_drain(self, up: Up) -> None:
        assert call(up, "drain", "decode-77", code=1).stderr.count("\n") == 1

    def test_a_time_limit_is_said_to_be_one(self, up: Up) -> None:
        flags = ("--max-output-tokens", "2000", "--ignore-eos", "--timeout", "0.2")
        assert "give more with --timeout" in call(up, "generate", "Hello", *flags, code=1).stderr

    def test_ctrl_c_cancels_a_request(self, up: Up, tmp_path: Path) -> None:
        output = tmp_path / "output"
        with output.open("wb") as stdout:
            flags = ("--max-output-tokens", "1900", "--ignore-eos", "--temperature", "0")
            command = starmesh("generate", "Hello", *flags, "--address", up.address)
            # What a shell runs in the background ignores Ctrl-C, and so would all that the tests start.
            process = subprocess.Popen(
                command,
                stdout=stdout,
                stderr=subprocess.PIPE,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no other thread forks
            )
        until(lambda: output.stat().st_size, "the first text")
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, stderr) == (130, b"")

        def sequences() -> int:
            instances = json.loads(call(up, "status", "--json").stdout)["instances"]
            return sum(instance.get("load", {}).get("running_sequences", 0) for instance in instances)

        until(lambda: sequences() == 0, "the sequence to be gone")

    def test_a_service_that_dies_is_started_again(self, up: Up) -> None:
        os.kill(up.service("decode-1").pid, signal.SIGKILL)
        up.wait_for(r"decode-1 died \(killed by SIGKILL\); starting it again")
        up.wait_for(r"decode-1 serves again at \S+")
        call(up, "generate", "Hello", "-n", "2")

    def test_a_drained_instance_has_nothing_left(self, up: Up) -> None:
        """Last but one: what has drained takes nothing more."""
        assert "decode-0 has drained" in call(up, "drain", "decode-0").stdout
        instances = json.loads(call(up, "status", "--json").stdout)["instances"]
        states = {instance["instance_id"]: instance["state"] for instance in instances}
        assert states["decode-0"] == "INSTANCE_STATE_DRAINED"
        call(up, "generate", "Hello", "-n", "2")

    def test_sigterm_stops_everything(self, up: Up) -> None:
        """Last: it ends the module's cluster."""
        processes = up.descendants()
        assert len(processes) == 7
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(TIMEOUT_S) == 0
        assert up.output().endswith("the cluster has stopped\n")
        gone(processes)


def test_a_service_that_cannot_start_is_reported_with_its_log(tmp_path: Path, tiny_model_dir: Path) -> None:
    up = start_up(tmp_path / "log", tiny_model_dir, "--device", "no-such-device")
    assert up.process.wait(TIMEOUT_S) == 1
    assert re.search(
        r"starmesh: (prefill|decode)-\d ended while it started \(exit code \d\); the end of its log", up.output()
    )
    assert "no-such-device" in up.output()
    assert "Traceback" not in up.output()


def test_kill_9_leaves_no_process(tmp_path: Path, tiny_model_dir: Path) -> None:
    up = start_up(tmp_path / "log", tiny_model_dir, "--decode", "1")
    up.wait_for("services are starting")
    until(lambda: len(up.descendants()) == 6, "all processes", up.output)
    processes = up.descendants()
    up.process.kill()
    up.process.wait()
    gone(processes)


def test_without_a_router_one_line_says_what_to_do() -> None:
    for arguments in (["generate", "hello"], ["status"], ["drain", "decode-0"]):
        command = starmesh(*arguments, "--address", "127.0.0.1:9")
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 1
        assert done.stderr == (
            "starmesh: no router answers at 127.0.0.1:9; "
            "start a cluster with `starmesh up`, or name another with --address\n"
        )
