"""`koopmon runs`, `runs rm` and `runs prune`."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from koopmon.cli import main
from koopmon.cli.live_monitors import announce
from koopmon.history.writer import HistoryWriter
from tests.cli.conftest import CommandLine
from tests.cli.test_embedded_monitor import LOOK
from tests.report.recorder import Recorder, guarded

DAY = 86_400.0


def record(path: Path, run: str, *, days_ago: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(path, run)
    recorder.began -= days_ago * DAY
    guarded(recorder).close()


def calm(path: Path, run: str) -> None:
    """Record a run without commands, which several runs of one history may be."""
    recorder = Recorder(path, run)
    recorder.hello()
    recorder.saw(3, 0.25, 2.0)
    recorder.ended()
    recorder.close()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory with a new run, an old one, and one of a shared monitor."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("KOOPMON_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "koopmon"
    record(state / "runs" / "team,new.sqlite3", "team/new")
    record(state / "runs" / "old.sqlite3", "old", days_ago=40)
    record(state / "monitor.sqlite3", "shared", days_ago=1)
    return state


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["runs", *words, "--json"]) == 0
    return {row["run"]: row for row in json.loads(capsys.readouterr().out)["runs"]}


def test_the_runs_as_data_latest_first(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = listed(capsys)
    assert list(rows) == ["team/new", "shared", "old"]
    new = rows["team/new"]
    assert (new["state"], new["last_step"], new["num_snapshots"], new["num_launches"]) == ("ended", 200, 101, 1)
    assert (new["max_risk"], new["loss"], new["lr_scale"], new["page"]) == (0.85, 2.8, 0.5, None)
    assert new["store"] == str(state / "runs" / "team,new.sqlite3")
    assert abs(new["last_seen"] - time.time()) < 60


def test_the_runs_as_a_table(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs"]) == 0
    text = capsys.readouterr().out
    head, *lines = [line for line in text.splitlines() if any(word in line for word in ("highest risk", "ended"))]
    assert [word.strip() for word in head.strip("┃").split("┃")] == [
        *("run", "state", "steps", "highest risk", "loss", "LR scale", "last activity")
    ]
    cells = [cell.strip() for cell in lines[0].strip("│").split("│")]
    assert cells[:6] == ["team/new", "ended", "200", "0.85", "2.8", "0.5"]


def test_another_file_can_be_listed(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(listed(capsys, "--store", str(state / "monitor.sqlite3"))) == ["shared"]


def test_listing_leaves_one_file_for_each_history(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed(capsys)
    assert sorted(path.name for path in (state / "runs").iterdir()) == ["old.sqlite3", "team,new.sqlite3"]


def test_a_history_that_cannot_be_read_is_one_line_beside_the_others(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (state / "runs" / "text.sqlite3").write_text("no database\n" * 200)
    with sqlite3.connect(state / "runs" / "old.sqlite3") as database:
        database.execute("UPDATE observations SET risk = 'much'")
    database.close()
    assert main(["runs", "--json"]) == 0
    told = capsys.readouterr()
    assert [row["run"] for row in json.loads(told.out)["runs"]] == ["team/new", "shared"]
    assert told.err.count("\n") == 2
    assert all(line.startswith("koopmon: store ") for line in told.err.splitlines())


def test_a_running_job_has_its_page_also_outside_of_the_state_directory(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path / "elsewhere.sqlite3", "live")
    early = announce("live", "http://127.0.0.1:1/", recorder.path)
    assert early is not None
    assert listed(capsys)["live"]["state"] == "starting"
    recorder.hello()
    recorder.saw(3, 0.25, 2.0)
    recorder.store.commit()
    live = listed(capsys)["live"]
    assert (live["state"], live["page"], live["last_step"]) == ("running", "http://127.0.0.1:1/", 3)
    assert main(["runs"]) == 0
    assert "http://127.0.0.1:1/" in capsys.readouterr().out
    assert main(["runs", "rm", "live"]) == 2
    told = capsys.readouterr()
    assert "run 'live' is left as it is: " in told.err
    assert told.err.count("\n") == 1
    early.close()
    recorder.close()
    assert recorder.path.exists()


def test_the_further_runs_of_a_job_are_found_by_their_names(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("gan.v2", "gan.v2.Critic", "gan.v2.encoder.block"):
        calm(state / "runs" / "gan.v2.sqlite3", name)
    assert {"gan.v2", "gan.v2.Critic", "gan.v2.encoder.block"} <= set(listed(capsys))
    beside = {
        "gan.v2": ["gan.v2.Critic", "gan.v2.encoder.block"],
        "gan.v2.Critic": ["gan.v2"],
        "gan.v2.encoder.block": ["gan.v2"],
        "old": [],
    }
    for name, others in beside.items():
        assert main(["report", name, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["run"], facts["beside"]) == (name, others)
    assert main(["report", "gan.v2", "--out", "seen"]) == 0
    line = "Other runs of the job: gan.v2.Critic, gan.v2.encoder.block: `koopmon report NAME`"
    assert line in capsys.readouterr().out.splitlines()
    assert main(["runs", "rm", "gan.v2.Critic"]) == 0
    capsys.readouterr()
    assert {"gan.v2", "gan.v2.encoder.block"} <= set(listed(capsys))
    assert main(["report", "gan.v3.Critic"]) == 2


def test_a_further_run_of_a_running_job_has_its_page(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = state / "runs" / "job.sqlite3"
    calm(path, "job.Critic")
    recorder = Recorder(path, "job")
    recorder.hello()
    announced = announce("job", "http://127.0.0.1:1/", path)
    assert announced is not None
    rows = listed(capsys)
    assert [(rows[name]["state"], rows[name]["page"]) for name in ("job", "job.Critic")] == [
        ("running", "http://127.0.0.1:1/"),
        ("ended", "http://127.0.0.1:1/"),
    ]
    announced.close()
    recorder.close()


def test_without_a_run_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["runs"]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("koopmon: no run is recorded; ")
    assert listed(capsys) == {}


def test_rm_deletes_runs_by_name(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "rm", "team/new", "shared", "team/new"]) == 0
    assert "2 runs deleted, " in capsys.readouterr().out
    assert list(listed(capsys)) == ["old"]
    assert not (state / "monitor.sqlite3").exists()


def test_rm_of_an_unknown_run_deletes_nothing(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "rm", "old", "older"]) == 2
    assert "did you mean old?" in capsys.readouterr().err
    assert "old" in listed(capsys)


def test_prune_deletes_the_old_runs_and_old_histories_without_a_run(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, fresh = state / "runs" / "empty.sqlite3", state / "runs" / "fresh.sqlite3"
    for path in (empty, fresh):
        HistoryWriter.open(path).close()
    old = time.time() - 40 * DAY
    os.utime(empty, (old, old))
    assert main(["runs", "prune", "--older-than", "30d", "--yes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in told["removed"]] == ["old", None]
    assert told["freed_bytes"] > 0
    assert list(listed(capsys)) == ["team/new", "shared"]
    assert not empty.exists()
    assert fresh.exists()


def test_prune_leaves_a_held_history_alone(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = HistoryWriter.open(state / "runs" / "old.sqlite3")
    assert main(["runs", "prune", "--older-than", "1d", "--yes"]) == 0
    writer.close()
    assert "1 run deleted" in capsys.readouterr().out, "the one of the shared history"
    assert list(listed(capsys)) == ["team/new", "old"]


def test_nothing_to_prune_needs_no_confirmation(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "prune", "--older-than", "52w"]) == 0
    assert "0 runs deleted" in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "status", "left"), [("y\n", 0, 2), ("n\n", 1, 3), ("", 130, 3)])
def test_prune_asks_at_a_terminal(
    state: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    status: int,
    left: int,
) -> None:
    class Terminal:
        def __init__(self) -> None:
            self.lines = [answer]

        def isatty(self) -> bool:
            return True

        def readline(self, *_: object) -> str:
            return self.lines.pop() if self.lines else ""

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["runs", "prune", "--older-than", "30d"]) == status
    told = capsys.readouterr()
    assert "Delete 1 run?" in told.err
    assert len(listed(capsys)) == left


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rm", "nobody"], "run 'nobody': not in 3 histories"),
        (["rm", "old", "--store", "none.sqlite3"], "store none.sqlite3: no such file"),
        (["prune", "--older-than", "30x"], "--older-than '30x': allowed are a number and m, h, d or w, such as 30d"),
        (["prune", "--older-than", "-1d"], "--older-than '-1d'"),
        (["prune", "--older-than", "d"], "--older-than 'd'"),
        (["prune", "--older-than", "1d"], "2 runs would be deleted: --yes confirms it"),
        (["--store", "none.sqlite3"], "store none.sqlite3: no such file"),
        (["list"], "No such command 'list'"),
    ],
)
def test_bad_input_is_one_line(state: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main(["runs", *words]) == 2
    told = capsys.readouterr()
    assert says in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert len(listed(capsys)) == 3


@pytest.mark.process
def test_a_guarded_job_is_listed_with_its_page_and_leaves_one_file(koopmon: CommandLine, tmp_path: Path) -> None:
    process = koopmon.start("run", "--run", "mine", "--", sys.executable, "-S", "-c", LOOK + "input()")
    assert process.stdout is not None
    seen = json.loads(process.stdout.readline())
    end = time.monotonic() + 60
    while not (rows := json.loads(koopmon("runs", "--json").stdout)["runs"]) and time.monotonic() < end:
        time.sleep(0.1)
    assert [(row["run"], row["state"], row["page"]) for row in rows] == [
        ("mine", "starting", f"http://{seen['http']}/")
    ]
    assert process.communicate(b"\n", timeout=60)[0] == b""
    assert process.returncode == 0
    files = [
        path.relative_to(tmp_path / "state" / "koopmon") for path in (tmp_path / "state").rglob("*") if path.is_file()
    ]
    assert files == [Path("runs/mine.sqlite3")]
    assert json.loads(koopmon("runs", "--json").stdout)["runs"] == []
