"""Trace files: each format, what is wrong with a file, and replay at another rate. All files here are made up."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from starmesh.sim.predictors import make_predictor
from starmesh.sim.workload import (
    TRACE_FORMATS,
    SimulatedRequest,
    TraceRow,
    WorkloadConfig,
    WorkloadError,
    describe,
    draw_requests,
    output_cap,
    read_trace,
)
from starmesh.sim.workload.trace import MOST_LINE_BYTES

pytestmark = pytest.mark.fast

FILES = {
    "plain_csv": "arrives_s,prompt_tokens,output_tokens\n10,5,7\n10.25,6,8\n12.5,9,1\n",
    "plain_jsonl": '{"arrives_s": 10, "prompt_tokens": 5, "output_tokens": 7}\n'
    '{"arrives_s": 10.25, "prompt_tokens": 6, "output_tokens": 8}\n'
    '{"output_tokens": 1, "arrives_s": 12.5, "prompt_tokens": 9, "user": null}\n',
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2031-01-31 23:59:59.5000000,5,7\n2031-01-31 23:59:59.7500000,6,8\n2031-02-01 00:00:02.0000000,9,1\n",
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "10,A,5,7,12,API log\n10.25,A,6,8,14,API log\n11,A,44,0,44,API log\n12.5,B,9,1,10,API log\n",
    "mooncake": '{"timestamp": 10000, "input_length": 5, "output_length": 7, "hash_ids": [1, 2]}\n'
    '{"timestamp": 10250, "input_length": 6, "output_length": 8, "hash_ids": []}\n'
    '{"timestamp": 12500, "input_length": 9, "output_length": 1, "hash_ids": [1]}\n',
}
ROWS = [TraceRow(0.0, 5, 7), TraceRow(0.25, 6, 8), TraceRow(2.5, 9, 1)]
VARIANTS = {
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2032-02-29 23:59:59.500000+00:00,5,7\n2032-02-29 23:59:59.75+00:00,6,8\n2032-03-01 00:00:02+00:00,9,1\n",
    "burstgpt": "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "10,1,2.0,A,5,7,12,API log\n10.25,,1.0,A,6,8,14,API log\n12.5,2,0.1,B,9,1,10,API log\n",
}


def written(directory: Path, content: str | bytes, name: str = "trace.txt") -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def replayed(path: Path, **changes: Any) -> list[SimulatedRequest]:
    workload = {"requests": 100, "arrivals": "trace", "lengths": "trace", "trace_path": str(path), **changes}
    return list(draw_requests(WorkloadConfig(**workload), seed=0))


@pytest.mark.parametrize("name", sorted(TRACE_FORMATS))
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_format_is_read(tmp_path: Path, name: str, named: bool, packed: bool) -> None:
    content = FILES[name].encode()
    path = written(tmp_path, gzip.compress(content) if packed else content, "trace.gz" if packed else "trace")
    assert list(read_trace(path, format_name=name if named else None)) == ROWS


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_later_versions_of_a_format_are_read(tmp_path: Path, name: str) -> None:
    assert list(read_trace(written(tmp_path, VARIANTS[name]))) == ROWS


@pytest.mark.parametrize("name", sorted(TRACE_FORMATS))
def test_a_byte_order_mark_blank_lines_and_foreign_line_ends_do_no_harm(tmp_path: Path, name: str) -> None:
    content = "\ufeff" + FILES[name].replace("\n", "\r\n\r\n")
    assert list(read_trace(written(tmp_path, content))) == ROWS


def test_our_own_formats_name_requests_and_limits(tmp_path: Path) -> None:
    csv = "request_id,max_output_tokens,arrives_s,prompt_tokens,output_tokens\na,9,0,1,2\n,,1,1,20\n"
    assert list(read_trace(written(tmp_path, csv))) == [TraceRow(0, 1, 2, "a", 9), TraceRow(1, 1, 20, "", None)]
    rows = [
        {"arrives_s": 0, "prompt_tokens": 1, "output_tokens": 20, "request_id": "twice", "max_output_tokens": 9},
        {"arrives_s": 0, "prompt_tokens": 1, "output_tokens": 20, "request_id": "twice", "max_output_tokens": None},
    ]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)))
    first, second = replayed(path, max_output_tokens=15)
    assert (first.output_tokens, first.max_output_tokens) == (9, 9)
    assert (second.output_tokens, second.max_output_tokens) == (15, 15)
    assert first.request_id != second.request_id and "twice" in first.request_id


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("\n  \n", "is empty"),
        ("a,b,c\n1,2,3\n", "line 1: no known trace begins with 'a,b,c'. Known are plain_jsonl: JSON with arrives_s"),
        ('{"a": 1}\n', "line 1: no known trace"),
        ('{"arrives_s": \n', "line 1: expected one JSON object"),
        (FILES["plain_csv"] + "13,1\n", "line 5: expected 3 values as the header has, found 2"),
        (FILES["plain_csv"] + "13,1,2,3\n", "line 5: expected 3 values as the header has, found 4"),
        (FILES["plain_csv"] + '13,"1,2\n', "line 5: expected comma-separated values"),
        (FILES["plain_csv"] + "13,1.5,2\n", "line 5: prompt_tokens is a whole number of tokens from 0 to 10000000"),
        (FILES["plain_csv"] + "13,1,-2\n", "line 5: output_tokens is a whole number of tokens"),
        (FILES["plain_csv"] + "13,1,10000001\n", "line 5: output_tokens is a whole number of tokens"),
        (FILES["plain_csv"] + "13,1," + "9" * 5000 + "\n", "line 5: output_tokens is a whole number of tokens"),
        (FILES["plain_csv"] + "nan,1,2\n", "line 5: arrives_s is a number of seconds"),
        (FILES["plain_csv"] + "1e300,1,2\n", "line 5: arrives_s is a number of seconds"),
        (FILES["plain_csv"] + "9,1,2\n", "line 5: arrives 3.500 s before a request above it; sort the file"),
        (FILES["plain_jsonl"] + "[1]\n", "line 4: expected one JSON object"),
        (
            FILES["plain_jsonl"] + '{"arrives_s": 13, "prompt_tokens": 1}\n',
            "line 4: a plain_jsonl request has arrives_s",
        ),
        (
            FILES["plain_jsonl"] + '{"arrives_s": 13, "prompt_tokens": true, "output_tokens": 1}\n',
            "line 4: prompt_tokens is",
        ),
        (
            '{"arrives_s": 13, "prompt_tokens": 1, "output_tokens": 1, "max_output_tokens": 0}\n',
            "line 1: max_output_tokens is a limit of at least 1 token, not 0",
        ),
        (FILES["azure"] + "yesterday,1,2\n", "line 5: TIMESTAMP is a date and time like"),
        (FILES["azure"] + "2031-02-30 00:00:00.0,1,2\n", "line 5: TIMESTAMP is a date and time like"),
        (FILES["mooncake"] + '{"timestamp": -1, "input_length": 1, "output_length": 1}\n', "line 4: timestamp is"),
        (FILES["mooncake"] + '{"timestamp": 1' + "0" * 400 + ', "input_length": 1, "output_length": 1}\n', "line 4"),
        ("[" * 100_000, "line 1: no known trace"),
        ("{" * 100_000, "line 1: expected one JSON object"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path: Path, content: str, said: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(WorkloadError) as caught:
        list(read_trace(path))
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 600


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    packed = gzip.compress((FILES["plain_csv"] * 1).encode() + b"13,1,2\n" * 3000)
    for name, content, said in (
        ("cut.gz", packed[: len(packed) // 2], "damaged or cut gzip"),
        ("plain.gz", FILES["azure"].encode(), "cannot be read"),
        ("latin.csv", FILES["plain_csv"].encode() + b"\xff\xfe\n", "line 5: not UTF-8"),
        ("long.csv", FILES["plain_csv"].encode() + b"1" * (MOST_LINE_BYTES + 1), "line 5: longer than"),
        ("wrong.csv", FILES["plain_csv"].encode(), "has a column 'TIMESTAMP'"),
    ):
        path = written(tmp_path, content, name)
        with pytest.raises(WorkloadError, match=said):
            list(read_trace(path, format_name="azure" if name == "wrong.csv" else None))
    with pytest.raises(
        WorkloadError, match=r"missing\.csv cannot be read: No such file .*; name a trace file that is there"
    ):
        list(read_trace(tmp_path / "missing.csv"))
    with pytest.raises(WorkloadError, match="trace formats are plain_jsonl"):
        list(read_trace(written(tmp_path, FILES["azure"]), format_name="azur"))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    begin=st.sampled_from(["", *FILES.values()]),
    rest=st.lists(
        st.one_of(
            st.binary(max_size=40), st.text(alphabet='{}[]",:0123456789.eE-+nulltrue\n', max_size=60).map(str.encode)
        ),
        max_size=4,
    ),
)
def test_whatever_is_in_a_file_it_is_read_or_refused(tmp_path: Path, begin: str, rest: list[bytes]) -> None:
    path = written(tmp_path, begin.encode() + b"\n".join(rest))
    try:
        rows = list(read_trace(path))
    except WorkloadError as error:
        assert str(path) in str(error)
    else:
        assert all(row.prompt_tokens > 0 and row.output_tokens > 0 for row in rows)
        assert [row.arrives_s for row in rows] == sorted(row.arrives_s for row in rows)


REQUESTS = st.lists(
    st.tuples(st.floats(0, 1e6), st.integers(1, 10**7), st.integers(1, 10**7)), min_size=1, max_size=20
).map(lambda rows: sorted(rows, key=lambda row: row[0]))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(requests=REQUESTS)
def test_our_own_formats_come_back_as_written(tmp_path: Path, requests: list[tuple[float, int, int]]) -> None:
    began = requests[0][0]
    wanted = [TraceRow(arrives - began, prompt, output) for arrives, prompt, output in requests]
    columns = ("arrives_s", "prompt_tokens", "output_tokens")
    lines = [json.dumps(dict(zip(columns, request, strict=True))) for request in requests]
    assert list(read_trace(written(tmp_path, "\n".join(lines)))) == wanted
    table = "\n".join(",".join(map(repr, request)) for request in requests)
    assert list(read_trace(written(tmp_path, f"{','.join(columns)}\n{table}\n"))) == wanted


def test_clocks_that_differ_a_little_are_no_error(tmp_path: Path) -> None:
    path = written(tmp_path, FILES["plain_csv"] + "11.9,1,1\n13,1,1\n")
    assert [row.arrives_s for row in read_trace(path)] == [0.0, 0.25, 2.5, 2.5, 3.0]


def test_a_trace_is_replayed_as_it_is_or_at_a_rate(tmp_path: Path) -> None:
    path = written(tmp_path, FILES["azure"])
    as_it_is = replayed(path)
    assert [request.arrives_s for request in as_it_is] == [0.0, 0.25, 2.5]
    assert [(request.prompt_tokens, request.output_tokens) for request in as_it_is] == [(5, 7), (6, 8), (9, 1)]
    # Two gaps in 2.5 s are 0.8 a second.
    faster = replayed(path, rate=8.0)
    assert [request.arrives_s for request in faster] == pytest.approx([0.0, 0.025, 0.25])
    assert describe(
        WorkloadConfig(requests=3, rate=8.0, arrivals="trace", lengths="trace", trace_path=str(path)), seed=0
    ).rate == pytest.approx(8.0)
    # The rate is that of the requests that are used: of two, one gap of 0.25 s.
    assert [request.arrives_s for request in replayed(path, rate=8.0, requests=2)] == pytest.approx([0.0, 0.125])


def test_either_half_of_a_trace_can_be_used(tmp_path: Path) -> None:
    path = written(tmp_path, FILES["mooncake"])
    drawn_lengths = replayed(path, lengths="chat")
    assert [request.arrives_s for request in drawn_lengths] == [0.0, 0.25, 2.5]
    drawn_times = replayed(path, arrivals="poisson", rate=1.0)
    assert [request.output_tokens for request in drawn_times] == [7, 8, 1]
    assert [request.arrives_s for request in drawn_times] != [0.0, 0.25, 2.5]


def outputs_of(directory: Path, *tokens: int, **changes: Any) -> WorkloadConfig:
    """A workload of a trace with these output lengths, all at once."""
    rows = "".join(f"1,5,{count}\n" for count in tokens)
    path = written(directory, f"arrives_s,prompt_tokens,output_tokens\n{rows}")
    workload = {"requests": 9999, "arrivals": "trace", "lengths": "trace", "trace_path": str(path), **changes}
    return WorkloadConfig(**workload)


def test_how_long_the_outputs_of_a_trace_get(tmp_path: Path) -> None:
    assert output_cap(outputs_of(tmp_path, 40, 700, 3)) == 700
    assert output_cap(outputs_of(tmp_path, 40, 700, 3, rate=2.0)) == 700  # which the trace has none of to change
    assert output_cap(outputs_of(tmp_path, 40, 700, 3, requests=1)) == 40
    assert output_cap(outputs_of(tmp_path, 40, 700, 3, output_scale=0.1)) == 70
    assert output_cap(outputs_of(tmp_path, 40, 700, 3, max_output_tokens=100)) == 100
    assert output_cap(outputs_of(tmp_path, *range(1, 1000), 30_000)) == 999
    assert output_cap(outputs_of(tmp_path)) == 32_768
    assert "outputs of up to 700 tokens" in str(describe(outputs_of(tmp_path, 40, 700, 3), seed=0))


@pytest.mark.parametrize("name", ["measured", "paper"])
def test_predictions_for_a_trace_are_on_its_scale(tmp_path: Path, name: str) -> None:
    config = outputs_of(tmp_path, *range(100, 1000))
    predictor = make_predictor(name, seed=0, cap_tokens=output_cap(config))
    assert predictor is not None
    keys = np.arange(900)
    totals = keys + 100
    median, _, _ = predictor.remaining(keys, totals - 20, totals, np.full(900, config.max_output_tokens))
    assert np.median(median) < 200


def test_a_trace_without_a_rate_of_its_own_or_without_requests(tmp_path: Path) -> None:
    at_once = written(tmp_path, "arrives_s,prompt_tokens,output_tokens\n1,1,1\n1,1,1\n")
    assert [request.arrives_s for request in replayed(at_once)] == [0.0, 0.0]
    with pytest.raises(WorkloadError, match="arrive at once"):
        replayed(at_once, rate=1.0)
    empty = written(tmp_path, "arrives_s,prompt_tokens,output_tokens\n1,1,0\n")
    assert replayed(empty) == []
    with pytest.raises(WorkloadError, match="holds no request"):
        describe(
            WorkloadConfig(requests=3, arrivals="trace", lengths="trace", trace_path=str(empty)),
            seed=0,
        )
