"""Recordings: of rounds against real peers, planned again and compared; of bounded size; cut off, and gone on with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from services.rescheduler.recorder import Recorder
from services.rescheduler.replay import main, read_rounds, replay
from starmesh.policy.rescheduling import PlanMemory, plan
from starmesh.policy.rescheduling.record import InvalidRecord, RecordedRound, encode_round
from tests.policy.decoding import CONFIG, decode, sequence
from tests.policy.views import cluster
from tests.rescheduler.conftest import Cluster, until
from tests.rescheduler.test_loop import FOUR, REFUSED, moved

VIEW = cluster(decode("d0", *FOUR), decode("d1"))
ROUND = RecordedRound(VIEW, PlanMemory(), CONFIG, plan(VIEW, PlanMemory(), CONFIG))
LINE = encode_round(ROUND) + "\n"
MANY = 1 << 20


async def test_a_run_is_planned_again_and_equal(mesh: Cluster, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "rounds", max_bytes=MANY)
    rescheduler = mesh.start(config=dataclasses.replace(CONFIG, policy="star_plus"), recorder=recorder)
    mesh.d0.answers = [REFUSED]
    sequences = [sequence(f"s{number}", 50 + 7 * number, 30 * number) for number in range(8)]
    await mesh.d0.report(*sequences)
    await rescheduler.round()
    await until(lambda: not rescheduler.memory.in_flight, rescheduler.round)
    mesh.clock.advance(1.3)
    await mesh.d0.report(*sequences[3:])
    await mesh.d1.report(*map(moved, sequences[:3]))
    await until(lambda: not rescheduler.memory.in_flight, rescheduler.round)
    await recorder.close()
    found = replay(tmp_path / "rounds")
    assert found.difference == ""
    assert found.rounds == len(list(read_rounds(tmp_path / "rounds"))) > 2
    assert found.migrations > 1
    rounds = list(read_rounds(tmp_path / "rounds"))
    assert {cool.failures for recorded in rounds for cool in recorded.memory.cool_downs} == {0, 1}


def test_a_difference_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = json.loads(LINE)
    fields["plan"]["migrations"][0]["target"] = "d7"
    path = tmp_path / "rounds"
    path.write_text(LINE + json.dumps(fields) + "\n" + LINE)
    assert main([str(path)]) == 1
    shown = capsys.readouterr().out
    assert "round 2 is planned differently" in shown
    assert '-   "target": "d7",' in shown and '+   "target": "d1",' in shown


def test_equal_rounds_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rounds"
    path.write_text(LINE * 3 + LINE[:100])
    assert main([str(path)]) == 0
    assert capsys.readouterr().out == "3 rounds with 3 migrations, planned again: all equal\n"


def test_what_is_no_recording_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rounds"
    path.write_text(LINE + "{}\n")
    with pytest.raises(InvalidRecord, match="line 2 of"):
        replay(path)
    assert main([str(path)]) == 2
    path.write_bytes(b"\xff\n")
    assert main([str(path)]) == 2
    assert main([str(tmp_path / "missing")]) == 2
    assert main([]) == main(["--help"]) == 2
    assert "usage" in capsys.readouterr().err


async def test_recording_ends_at_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rounds"
    recorder = Recorder(path, max_bytes=2 * len(LINE) + 10)
    for _ in range(4):
        recorder.add(ROUND)
    await recorder.close()
    recorder.add(ROUND)
    assert path.read_text() == LINE * 2
    assert caplog.text.count("recording to") == 1


async def test_rounds_beyond_the_queue_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path / "rounds", max_bytes=MANY)
    for _ in range(20):
        recorder.add(ROUND)
    await recorder.close()
    assert (tmp_path / "rounds").read_text() == LINE * 8
    assert "is left out" in caplog.text


@pytest.mark.parametrize("left", ["", LINE, LINE * 40], ids=["nothing", "a line", "many lines"])
@pytest.mark.parametrize("cut", ["", LINE[:50], LINE[:-1], "x" * 200_000], ids=["whole", "cut", "no end", "long"])
async def test_a_recording_is_gone_on_with(tmp_path: Path, left: str, cut: str) -> None:
    path = tmp_path / "rounds"
    path.write_text(left + cut)
    recorder = Recorder(path, max_bytes=MANY)
    recorder.add(ROUND)
    await recorder.close()
    assert path.read_text() == left + LINE


async def test_a_full_disk_ends_the_recording_only(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(Path("/dev/full"), max_bytes=MANY)
    recorder.add(ROUND)
    await until(recorder._writing.done)
    recorder.add(ROUND)
    assert "recording to /dev/full ends" in caplog.text
    await recorder.close()


async def test_a_file_that_cannot_be_opened_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        Recorder(tmp_path, max_bytes=MANY)
