"""A store at rest is one file, also after reading; a reader never takes what a monitor has not yet written."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from koopmon.errors import StoreError
from koopmon.history.reader import HistoryReader
from koopmon.history.writer import HistoryWriter
from tests.report.recorder import RUN, Recorder, guarded


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def read(path: Path) -> int:
    with HistoryReader.open(path) as history:
        return len(list(history.observations(RUN)))


def test_a_store_at_rest_is_one_file_before_and_after_reading(tmp_path: Path) -> None:
    guarded(Recorder(tmp_path / "h.sqlite3")).close()
    assert names(tmp_path) == ["h.sqlite3"]
    assert read(tmp_path / "h.sqlite3") == 101
    assert names(tmp_path) == ["h.sqlite3"]


def test_the_first_of_two_readers_leaves_the_files_of_the_second(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite3"
    guarded(Recorder(path)).close()
    with HistoryReader.open(path) as second:
        rows = second.observations(RUN)
        next(rows)
        assert read(path) == 101
        assert len(list(rows)) == 100
    assert names(tmp_path) == ["h.sqlite3"]


def test_a_reader_beside_a_writer_leaves_its_files(tmp_path: Path) -> None:
    recorder = guarded(Recorder(tmp_path / "h.sqlite3"))
    recorder.store.commit()
    before = names(tmp_path)
    assert read(recorder.path) == 101
    assert names(tmp_path) == before
    recorder.saw(202, 0.1, 2.0)
    recorder.close()
    assert read(recorder.path) == 102


def test_the_log_of_a_killed_monitor_stays_for_the_next_one(tmp_path: Path) -> None:
    recorder = guarded(Recorder(tmp_path / "h.sqlite3"))
    recorder.store.commit()
    left = tmp_path / "left"
    left.mkdir()
    for name in ("h.sqlite3", "h.sqlite3-wal"):
        shutil.copy(tmp_path / name, left)
    recorder.close()
    size = (left / "h.sqlite3-wal").stat().st_size
    assert size > 0
    assert read(left / "h.sqlite3") == 101
    assert (left / "h.sqlite3-wal").stat().st_size == size


def test_an_empty_file_beside_a_log_is_left_as_it_is(tmp_path: Path) -> None:
    path, log = tmp_path / "h.sqlite3", tmp_path / "h.sqlite3-wal"
    path.touch()
    log.touch()
    with pytest.raises(StoreError):
        HistoryReader.open(path)
    assert path.stat().st_size == 0
    assert log.exists()


def test_a_store_that_cannot_be_opened_leaves_no_lock_file(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite3"
    path.write_text("no database\n" * 200)
    with pytest.raises(StoreError):
        HistoryWriter.open(path)
    assert names(tmp_path) == ["h.sqlite3"]


def test_the_overview_has_the_counts_of_all_launches(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite3"
    guarded(Recorder(path)).close()
    second = Recorder(path, incarnation="89abcdef")
    second.hello()
    second.saw(5, 0.3, 1.5)
    second.saw(6, 0.2)
    second.beat(260)
    second.close()
    idle = Recorder(path, run="idle", incarnation="12345678")
    idle.hello()
    idle.close()
    with HistoryReader.open(path) as history:
        run, nothing = history.overview()
    assert (run.name, run.num_launches, run.num_snapshots, run.last_step) == (RUN, 2, 103, 260)
    assert (run.max_risk, run.loss, run.lr_scale) == (0.85, 1.5, 1.0)
    assert (nothing.num_launches, nothing.num_snapshots) == (1, 0)
    assert (nothing.last_step, nothing.max_risk, nothing.loss, nothing.lr_scale) == (None, None, None, 1.0)


FOREIGN = [
    (
        "ALTER TABLE runs RENAME TO others",
        "CREATE VIEW runs AS WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x AS id, 'r' || x"
        " AS name, 0.0 AS first_seen, 0.0 AS last_seen, 1 AS state FROM c",
    ),
    ("CREATE TRIGGER t AFTER INSERT ON heartbeats BEGIN DELETE FROM decisions; END",),
    ("CREATE VIRTUAL TABLE t USING rtree (id, low, high)",),
]


@pytest.mark.parametrize("statements", FOREIGN)
def test_a_schema_that_no_store_has_is_refused_by_reader_and_writer(
    tmp_path: Path, statements: tuple[str, ...]
) -> None:
    """A view could have rows without end, and a trigger delete the rows of the monitor."""
    path = tmp_path / "h.sqlite3"
    guarded(Recorder(path)).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for statement in statements:
            database.execute(statement)
    with pytest.raises(StoreError, match="not a koopmon store"):
        HistoryReader.open(path)
    with pytest.raises(StoreError, match="not a koopmon store"):
        HistoryWriter.open(path)


@pytest.mark.parametrize("time", [1e300, -1e300, -1.0, 9e18, float("inf")])
@pytest.mark.parametrize("column", ["first_seen", "last_seen"])
def test_a_time_that_no_calendar_has_is_one_line(tmp_path: Path, column: str, time: float) -> None:
    path = tmp_path / "h.sqlite3"
    guarded(Recorder(path)).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"UPDATE runs SET {column} = ?", (time,))
    with HistoryReader.open(path) as history:
        for read in (history.overview, lambda: history.run(RUN), lambda: history.recent_runs(3)):
            with pytest.raises(StoreError, match="runs: a row cannot be read"):
                read()
