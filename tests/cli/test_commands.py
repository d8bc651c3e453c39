"""What the commands make of their arguments and of failures, short of a cluster."""

from __future__ import annotations

import dataclasses
import gzip
import inspect
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import grpc
import grpc.aio
import pytest
from rich.console import Console
from typer.testing import CliRunner

from services.predictor.config import PredictorSettings
from services.predictor.registry import BUILT_IN
from services.router.config import RouterSettings
from starmesh.cli.app import app
from starmesh.cli.bench import read_prompts
from starmesh.cli.local_cluster import ClusterPlan
from starmesh.cli.local_commands import up
from starmesh.cli.local_options import ONLINE_PREDICTOR, DispatchPolicy, Predicting
from starmesh.cli.options import Asking
from starmesh.cli.predictor_commands import collect
from starmesh.cli.run import CliError, explain
from starmesh.cli.scraping import write_targets
from starmesh.cli.status import TokenRates, cluster_table
from starmesh.instance.settings import EngineSettings
from starmesh.policy.dispatch import POLICIES
from starmesh.rpc.status import StatusError, bad_field, retry_later
from starmesh.v1 import cluster_pb2

pytestmark = pytest.mark.fast

runner = CliRunner()


def test_help_loads_neither_grpc_nor_torch() -> None:
    code = (
        "import sys\nfrom starmesh.cli.app import app\n"
        "try:\n    app(['up', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit(str(sorted({'grpc', 'torch', 'transformers', 'redis', 'numpy'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "\n"), "sys.exit('') prints an empty line: nothing was loaded"
    assert "--prefill" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "hello", "--file", "prompt.txt"],
        ["generate", ""],
        ["generate", "hello", "--seed", str(2**63)],
        ["generate", "hello", "-n", str(2**31)],
        ["bench", "prompts.jsonl", "--top-k", str(2**31)],
        ["up", "--decode", "0"],
        ["up", "--dispatch", "nosuch"],
        ["up", "--queue", "-1"],
        ["up", "--transfer", "nosuch"],
        ["bench", "prompts.jsonl", "--rate", "0"],
        ["up", "--predictor", "none", "--collect", "samples"],
        ["up", "--predictor", "none", "--dispatch", "predicted_load"],
        ["compare", "--predictor", "none", "--dispatch", "predicted_load"],
        ["predictor", "promote"],
        ["no-such-command"],
    ],
)
def test_a_command_asked_wrongly_ends_with_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


def test_a_result_that_could_not_be_written_is_found_before_the_load(tmp_path: Path) -> None:
    result = runner.invoke(app, ["bench", "-", "--json", str(tmp_path / "missing" / "out.json")])
    assert result.exit_code == 1
    assert "its directory does not exist" in result.stderr


def test_defaults_of_up_are_those_of_the_services() -> None:
    ours = {name: parameter.default for name, parameter in inspect.signature(up).parameters.items()}
    for name in ("device", "dtype", "kv_memory_mib", "block_tokens", "max_sequences", "max_step_tokens", "threads"):
        assert ours[name] == EngineSettings.model_fields[name].default, name
    assert ours["transfer"] is None, "the engines choose: it depends on TLS"
    assert ours["dispatch"] == RouterSettings.model_fields["dispatch_policy"].default
    assert ours["queue"] == RouterSettings.model_fields["queue_length"].default
    assert ours["collect_max_mib"] == PredictorSettings.model_fields["collect_max_mib"].default
    assert set(get_args(DispatchPolicy)) == set(POLICIES)


def test_the_predictor_that_takes_any_samples_has_its_name() -> None:
    assert ONLINE_PREDICTOR == BUILT_IN


def test_samples_are_collected_as_often_as_the_predictor_gets_them() -> None:
    ours = inspect.signature(collect).parameters["every_tokens"].default
    assert ours == EngineSettings.model_fields["hidden_every_tokens"].default


def test_a_taken_port_is_found_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = runner.invoke(app, ["up", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 1
    assert "name another with --port" in result.stderr


def test_a_model_that_is_nowhere_is_one_line() -> None:
    result = runner.invoke(app, ["model", "fetch", "nowhere"])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "give a directory" in result.stderr


def aio_error(error: StatusError) -> grpc.aio.AioRpcError:
    status = error.to_rpc_status()
    return grpc.aio.AioRpcError(
        status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), details=status.details
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            bad_field("sampling.temperature", "must be 0 to 2"),
            "the request is not valid: sampling.temperature: must be",
        ),
        (
            retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", 1.5),
            "the queue is full; try again in 1.5 s",
        ),
        (
            retry_later(grpc.StatusCode.UNAVAILABLE, "no decode instance is up", 1),
            "no decode instance is up; try again in",
        ),
        (StatusError(grpc.StatusCode.UNAVAILABLE, "refused"), "no router answers at here:1; start a cluster with"),
        (StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), "give more with --timeout"),
        (StatusError(grpc.StatusCode.UNIMPLEMENTED, "what"), "what answers at here:1 is no starmesh router"),
        (StatusError(grpc.StatusCode.INTERNAL, "reference ab12"), "the router failed: reference ab12"),
        (StatusError(grpc.StatusCode.NOT_FOUND, "no instance x"), "no instance x"),
    ],
)
def test_a_failed_call_is_one_line_that_says_what_to_do(error: StatusError, line: str) -> None:
    explained = explain(aio_error(error), address="here:1")
    assert line in explained
    assert "\n" not in explained


def test_a_request_has_only_what_was_asked_for() -> None:
    request = Asking(temperature=0.0, stop_strings=("a", "b")).request("hi", chat=False)
    assert request.text == "hi"
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")
    assert list(request.sampling.stop_strings) == ["a", "b"]
    request = Asking(system="Be brief.").request("hi", chat=True)
    assert [(message.role, message.content) for message in request.chat.messages] == [
        ("system", "Be brief."),
        ("user", "hi"),
    ]
    assert Asking(chat=False).request("hi", chat=True).text == "hi"


@pytest.mark.parametrize("packed", [False, True])
def test_prompts_are_read_line_by_line(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("prompts.jsonl.gz" if packed else "prompts.jsonl")
    data = b'{"prompt": "a", "set": "x"}\n\n{"prompt": "\xc3\xa9"}\n'
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_prompts(str(path)) == ["a", "é"]


@pytest.mark.parametrize("line", ['{"text": "a"}', '{"prompt": ""}', '{"prompt": 1}', '"prompt"', "not json"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a"}) + "\n" + line + "\n")
    with pytest.raises(CliError, match="line 2: each line must be an object"):
        read_prompts(str(path))


def test_no_prompts_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name in ("empty.jsonl", "missing.jsonl"):
        with pytest.raises(CliError, match=name):
            read_prompts(str(tmp_path / name))


def observation(at_s: float, output_tokens: int, *, age_s: float = 0.0) -> cluster_pb2.WatchClusterResponse:
    response = cluster_pb2.WatchClusterResponse(ledger_available=True)
    response.observe_time.FromNanoseconds(int(at_s * 1e9))
    instance = response.instances.add(
        instance_id="decode-0", role=cluster_pb2.ROLE_DECODE, state=cluster_pb2.INSTANCE_STATE_READY, address="h:1"
    )
    instance.load.total_blocks = 100
    instance.load.free_blocks = 75
    instance.load.output_tokens = output_tokens
    instance.report_age.FromNanoseconds(int(age_s * 1e9))
    return response


def test_token_rates_go_by_the_time_of_the_reports() -> None:
    rates = TokenRates()
    assert rates.observe(observation(10.0, 100)) == {}
    assert rates.observe(observation(11.0, 130)) == {"decode-0": pytest.approx(30)}
    # No report since: the rate stands, and the next one counts from the last report.
    assert rates.observe(observation(12.0, 130, age_s=1.0)) == {"decode-0": pytest.approx(30)}
    assert rates.observe(observation(13.0, 170)) == {"decode-0": pytest.approx(20)}
    # Started anew: no rate until it has two reports.
    assert rates.observe(observation(14.0, 3)) == {}
    assert rates.observe(observation(15.0, 5)) == {"decode-0": pytest.approx(2)}


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    response = observation(10.0, 123456)
    response.instances.add(
        instance_id="rescheduler-0",
        role=cluster_pb2.ROLE_RESCHEDULER,
        state=cluster_pb2.INSTANCE_STATE_DRAINING,
        address="127.0.0.1:65535",
    )
    response.instances[0].address = "127.0.0.1:65535"
    response.instances[0].load.resident_tokens = 123456
    response.ledger_available = False
    console = Console(width=80)
    with console.capture() as capture:
        console.print(cluster_table(response, {"decode-0": 1234.5}))
    text = capture.get()
    assert "…" not in text
    for part in ("decode-0", "ready", "25%", "1234.5", "123456", "rescheduler-0", "draining", "ledger does not answer"):
        assert part in text


def test_the_ledgers_url_is_in_no_argument(tmp_path: Path) -> None:
    plan = ClusterPlan(model=tmp_path, run_directory=tmp_path, prefill=2, decode=3, engine_flags=("--device", "cpu"))
    services = plan.services("redis://:secret@host:1")
    assert [service.instance_id for service in services] == [
        *("router-0", "prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2", "rescheduler-0", "predictor-0"),
    ]
    assert not any("secret" in flag for service in services for flag in service.flags)
    assert all(("--device" in service.flags) == (service.role in ("prefill", "decode")) for service in services)


def test_metrics_are_on_ports_in_a_row(tmp_path: Path) -> None:
    plan = ClusterPlan(model=tmp_path, run_directory=tmp_path, decode=1, metrics_port=9464)
    services = plan.services("redis://here")
    assert [service.metrics_address for service in services] == [f"127.0.0.1:{9464 + place}" for place in range(5)]
    targets = json.loads(write_targets(services, tmp_path).read_text())
    assert targets[0] == {"targets": ["127.0.0.1:9464"], "labels": {"job": "router"}}
    assert [target["labels"]["job"] for target in targets] == [service.role for service in services]
    without = dataclasses.replace(plan, metrics_port=0).services("redis://here")
    assert not any(service.metrics_address for service in without)


def test_without_a_predictor_decode_instances_look_for_none(tmp_path: Path) -> None:
    plan = ClusterPlan(model=tmp_path, run_directory=tmp_path, predictor_flags=("--predictor", "mine"))
    flags = {service.role: service.flags for service in plan.services("redis://here")}
    assert flags["predictor"][-2:] == ("--predictor", "mine")
    assert "--no-predict" not in flags["decode"]
    without = dataclasses.replace(plan, predict=False).services("redis://here")
    assert [service.role for service in without if "--no-predict" in service.flags] == ["decode", "decode"]
    assert not any(service.role == "predictor" for service in without)


def test_a_predictor_file_and_directories_are_named_from_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.safetensors").touch()
    predicting = Predicting(predictor="mine.safetensors", collect=Path("samples"), collect_max_mib=7)
    assert predicting.flags == (
        *("--predictor", str(tmp_path / "mine.safetensors")),
        *("--collect", str(tmp_path / "samples")),
        *("--collect-max-mib", "7"),
    )
    assert Predicting(predictor="linear-3", collect_max_mib=7).flags == ("--predictor", "linear-3")
    assert Predicting().flags == ()


def test_what_is_set_for_other_services_does_not_reach_those_of_a_local_cluster() -> None:
    """As in a container of a service, or in the shell of somebody who has a cluster elsewhere."""
    names = ("TLS_CA", "API_KEYS", "ADVERTISE", "HTTP_LISTEN", "METRICS_LISTEN", "LEDGER_PASSWORD_FILE", "LEDGER_CA")
    for_others = dict.fromkeys((f"STARMESH_{name}" for name in names), "elsewhere")
    ours = {"PATH": "/bin", "STARMESH_LEDGER": "redis://elsewhere"} | for_others
    plan = ClusterPlan(model=None, run_directory=Path("run"))
    for spec in plan.services("unix:///socket"):
        assert spec.environment(ours) == {"PATH": "/bin", "STARMESH_LEDGER": "unix:///socket"}
    outer = dataclasses.replace(plan, ledger="rediss://outer")
    for spec in outer.services(outer.ledger):
        passed_on = spec.environment(ours)
        assert passed_on["STARMESH_LEDGER_PASSWORD_FILE"] == passed_on["STARMESH_LEDGER_CA"] == "elsewhere"
