"""Deletion of runs: the whole file of the last run, the rows of one run among others, and nothing beside a monitor."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from koopmon.errors import StoreError
from koopmon.history.reader import HistoryReader
from koopmon.history.removal import remove_run
from koopmon.history.writer import HistoryWriter
from tests.report.recorder import Recorder, guarded

TABLES = ("runs", "incarnations", "profiles", "observations", "decisions", "commands", "acks", "heartbeats")


def counts(path: Path) -> dict[str, int]:
    database = sqlite3.connect(path)
    try:
        return {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}
    finally:
        database.close()


def test_the_last_run_goes_with_its_file_and_the_files_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "v1.2-a.sqlite3"
    guarded(Recorder(path, "v1.2-a"), profiled=True).close()
    for name in ("v1.2-a.sqlite3.log", "v1.2-a.settings", "v1.2-a.ended", "v1.2-b.settings"):
        (tmp_path / name).write_text("x")
    size = path.stat().st_size
    assert remove_run(path, "v1.2-a") == size > 0
    assert [each.name for each in tmp_path.iterdir()] == ["v1.2-b.settings"]


def test_of_a_shared_history_only_the_rows_of_the_run_go(tmp_path: Path) -> None:
    path = tmp_path / "monitor.sqlite3"
    guarded(Recorder(path, "stays"), profiled=True).close()
    alone = counts(path)
    recorder = Recorder(path, "goes", incarnation="89abcdef")
    recorder.count = 50  # ids of commands are unique in a file
    guarded(recorder, profiled=True).close()
    assert counts(path) == {table: 2 * count for table, count in alone.items()}
    assert remove_run(path, "goes") > 0
    assert counts(path) == alone
    with HistoryReader.open(path) as history:
        assert history.runs() == ["stays"]
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
    database.close()


def test_a_history_that_a_monitor_holds_is_left_as_it_is(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "h.sqlite3", "mine")
    recorder.hello()
    with pytest.raises(StoreError, match="in use by another monitor"):
        remove_run(recorder.path, "mine")
    recorder.saw(1, 0.1)
    recorder.close()
    with HistoryReader.open(recorder.path) as history:
        assert len(list(history.observations("mine"))) == 1


def test_a_history_without_a_run_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite3"
    HistoryWriter.open(path).close()
    remove_run(path, None)
    assert list(tmp_path.iterdir()) == []


def test_a_history_with_runs_is_not_deleted_as_one_without(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite3"
    guarded(Recorder(path, "mine")).close()
    before = counts(path)
    remove_run(path, None)
    assert counts(path) == before


@pytest.mark.parametrize("content", [b"no database\n" * 200, b"SQLite format 3\0" + bytes(100)])
def test_another_file_is_refused_and_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "h.sqlite3"
    path.write_bytes(content)
    with pytest.raises(StoreError):
        remove_run(path, "mine")
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["h.sqlite3"]


def test_a_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        remove_run(tmp_path / "none" / "h.sqlite3", "mine")
