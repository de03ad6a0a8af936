"""Durability of the history: SIGKILL, an older schema, a full disk, damage, its own size."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from koopmon.config import StoreConfig
from koopmon.errors import StoreError
from koopmon.history.reader import HistoryReader
from koopmon.history.removal import remove_run
from koopmon.history.retention import DAY_SECONDS
from koopmon.history.schema import SCHEMA_VERSION
from koopmon.history.writer import HistoryWriter
from koopmon.wire.codec import decode_for_agent
from koopmon.wire.headers import WireLimits
from koopmon.wire.messages import Ack, Applied, Command
from tests.factories import ack, command, heartbeat, hello, noisy_profile, record_observation

HERE = Path(__file__).parent
RUN, OTHER, FIRST, SECOND = "job", "other", "aaaaaaaa", "bbbbbbbb"
NOW = 1e9


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite3"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_store(path: Path, clock: Clock) -> Iterator[Callable[..., HistoryWriter]]:
    stores: list[HistoryWriter] = []

    def start(**config: Any) -> HistoryWriter:
        stores.append(HistoryWriter.open(path, StoreConfig(**config), clock=clock, wall=lambda: NOW))
        return stores[-1]

    yield start
    for store in stores:
        store.close()


def decide(store: HistoryWriter, number: int, *, at: float = NOW, run: str = RUN, incarnation: str = FIRST) -> None:
    wanted = command(number, run, incarnation, kind="stop")
    store.record_decision(
        at, run, incarnation, number, phase="alert", reason="", risk=0.5, commands=[wanted], outcome="pending"
    )
    store.record_ack(at, ack(number, run, incarnation))


def fill(store: HistoryWriter, rows: int, *, at: float = NOW, run: str = RUN, incarnation: str = FIRST) -> None:
    """Write profiles of 10 kB each, each with an observation and a heartbeat."""
    where = (at, run, incarnation)
    for step in range(rows):
        noise = noisy_profile(10_000)
        store.record_profile(*where, step, num_shards=1, masked=False, seconds=0.0, profile=noise)
        record_observation(store, at, step, run, incarnation, risk=0.5)
        store.record_heartbeat(at, heartbeat(step, run, incarnation))
    store.commit()


def keep_up(store: HistoryWriter, clock: Clock, *live: str) -> None:
    """Let a minute of upkeep pass."""
    for _ in range(70):
        clock.now += 1.0
        store.upkeep(live)


def ids(path: Path, run: str = RUN) -> list[str]:
    with HistoryReader.open(path) as history:
        return [row.command.id for decision in history.decisions(run) for row in decision.commands]


def count(path: Path, table: str) -> int:
    database = sqlite3.connect(path)
    (number,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
    database.close()
    return int(number)


@pytest.mark.process
def test_no_kill_9_at_any_moment_loses_what_was_acknowledged(path: Path) -> None:
    program = [sys.executable, str(HERE / "programs" / "killed_writers.py"), str(path), "40", "1"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, check=True)
    told = json.loads(done.stdout)
    assert len([word for word in told if word.endswith("!")]) > 40, "the writers came to write"
    with HistoryReader.open(path) as history:
        rows = [row for decision in history.decisions(RUN) for row in decision.commands]
    outcomes = {row.command.id: row.outcome for row in rows}
    assert len(outcomes) == len(rows), "none doubled"
    for word in told:
        outcome = outcomes[f"{int(word.rstrip('!')):08x}"]
        assert outcome == "applied" or not word.endswith("!")
    assert count(path, "profiles") < len(rows), "pruning was among the moments"
    assert not list(path.parent.glob("*.damaged-*"))


@pytest.mark.process
def test_every_command_that_left_a_killed_monitor_is_in_its_history(
    start_process: Callable[..., Any], connect: Callable[..., Any], store_path: Path
) -> None:
    # Every risk is an alarm, confirmed at once: a command follows every few snapshots.
    eager = {"act_risk": 1e-6, "severe_risk": 1e-5, "release_risk": 0.0, "cooldown_steps": 1, "dense_steps": 1}
    received: list[str] = []
    for launch in range(2):
        monitor = start_process(policy=eager | {"max_actions_per_hour": 100_000}, monitor={"svd_rank": 4})
        agent = connect(monitor.addresses.endpoint, incarnation=f"{launch:08x}")
        agent.hello()
        for step in range(1, 9):
            agent.snapshot(step, make_states(step) * (1.0 + step))
        agent.expect(Command)
        monitor.end(signal.SIGKILL)  # in the middle of the rest
        while (frames := agent.control.recv()) is not None:
            agent.seen.append(decode_for_agent(frames, limits=WireLimits()))
        received += [message.id for message in agent.seen if isinstance(message, Command)]
        agent.close()
    assert len(set(received)) >= 2
    assert set(received) <= set(ids(store_path))


def make_states(step: int) -> Tensor:
    """Draw a residual stream (4, 96, 12) in bfloat16."""
    generator = torch.Generator().manual_seed(step)
    return torch.cumsum(torch.randn((4, 96, 12), generator=generator), dim=0).bfloat16()


def old_store(path: Path, version: int) -> None:
    path.write_bytes(gzip.decompress((HERE / "stores" / f"schema-{version}.sqlite3.gz").read_bytes()))


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_a_store_of_an_earlier_version_is_read_and_then_brought_up_to_date(path: Path, version: int) -> None:
    """The code of its time wrote each file."""

    def content() -> list[Any]:
        with HistoryReader.open(path) as history:
            tables = (history.profiles, history.observations, history.decisions, history.heartbeats)
            return [history.incarnations(RUN), *(list(table(RUN)) for table in tables)]

    old_store(path, version)
    before = content()
    assert [len(rows) for rows in before] == [2, 2, 2, 2, 1]
    HistoryWriter.open(path).close()
    assert content() == before
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    indexes = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    database.close()
    fresh = path.with_name("fresh.sqlite3")
    HistoryWriter.open(fresh).close()
    database = sqlite3.connect(fresh)
    assert indexes == {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    database.close()


def test_what_is_over_goes_by_age_and_a_live_run_keeps_its_decisions(
    open_store: Callable[..., HistoryWriter], path: Path, clock: Clock
) -> None:
    store = open_store(max_age_days=10)
    old = NOW - 11 * DAY_SECONDS
    for number, (run, incarnation) in enumerate([(OTHER, FIRST), (RUN, FIRST), (RUN, SECOND)]):
        decide(store, number, at=old, run=run, incarnation=incarnation)
        fill(store, 3, at=old, run=run, incarnation=incarnation)
        if (run, incarnation) != (RUN, SECOND):
            store.record_state(old, run, incarnation, 0, end_reason="finished")
    fill(store, 2, run=RUN, incarnation=SECOND)
    keep_up(store, clock, RUN)
    assert ids(path, OTHER) == []
    assert ids(path) == ["00000001", "00000002"], "those of earlier launches too"
    assert [count(path, table) for table in ("acks", "profiles", "observations", "heartbeats")] == [2, 2, 2, 2]
    with HistoryReader.open(path) as history:
        assert history.runs() == [RUN]
    decide(store, 7, run=OTHER)
    assert ids(path, OTHER) == ["00000007"], "a run whose rows went may come back"


def test_a_run_that_a_new_monitor_has_not_heard_yet_counts_as_live(
    open_store: Callable[..., HistoryWriter], path: Path, clock: Clock
) -> None:
    store = open_store(max_age_days=0.001)
    decide(store, 0, at=NOW - 3600.0)
    keep_up(store, clock)
    assert ids(path) == ["00000000"]


def test_a_jump_of_the_calendar_deletes_nothing(path: Path, clock: Clock) -> None:
    days = [0.0]
    store = HistoryWriter.open(path, clock=clock, wall=lambda: NOW + days[0] * DAY_SECONDS)
    decide(store, 0)
    store.record_state(NOW, RUN, FIRST, 0, end_reason="finished")
    days[0] = 4000.0
    keep_up(store, clock)
    store.close()
    assert ids(path) == ["00000000"]


def test_size_takes_the_oldest_of_what_is_over_first_and_no_decision(
    open_store: Callable[..., HistoryWriter], path: Path, clock: Clock
) -> None:
    store = open_store(max_bytes=2 << 20)
    for number, run in enumerate([OTHER, RUN]):
        decide(store, number, run=run)
        fill(store, 150, run=run)
    store.record_state(NOW, OTHER, FIRST, 0, end_reason="finished")
    keep_up(store, clock, RUN)
    with HistoryReader.open(path) as history:
        kept = {run: len(list(history.profiles(run))) for run in (OTHER, RUN)}
    assert kept[OTHER] < kept[RUN]
    assert 50 < kept[RUN] <= 150
    fill(store, 300)
    keep_up(store, clock, RUN)
    assert ids(path) + ids(path, OTHER) == ["00000001", "00000000"]
    store.close()
    assert path.stat().st_size < 3 << 20, "the space goes back to the file system"


def test_launches_without_a_decision_go_last(
    open_store: Callable[..., HistoryWriter], path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer can begin any number of runs and launches."""
    store = open_store(max_bytes=1 << 20)
    decide(store, 0, run=OTHER)
    store.record_state(NOW, OTHER, FIRST, 0, end_reason="finished")
    for number in range(1000):
        store.record_hello(NOW, hello(RUN, f"{number:08x}", hostname="h" * 255))
        store.record_hello(NOW, hello(f"run-{number}", hostname="h" * 255))
        store.record_state(NOW, f"run-{number}", FIRST, 0, end_reason="g" * 512)
    store.commit()
    for _ in range(200):
        keep_up(store, clock, RUN)
    pages = store._retention._pragma("page_count") - store._retention._pragma("freelist_count")
    assert pages * store._retention._pragma("page_size") < 1 << 20
    with HistoryReader.open(path) as history:
        assert OTHER in history.runs()
        assert history.incarnations(RUN)[-1].incarnation == f"{999:08x}"
    assert ids(path, OTHER) == [command(0).id]
    assert "nothing more is deleted" not in caplog.text


def test_decisions_alone_are_kept_beyond_the_size_and_said_once(
    open_store: Callable[..., HistoryWriter], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(max_bytes=1 << 20)
    for number in range(3000):
        store.record_outcome(f"{number:08x}", "unanswered")
    with store._database as database:
        database.execute("CREATE TABLE ballast AS SELECT zeroblob(2000000) AS bytes")
    keep_up(store, clock, RUN)
    keep_up(store, clock, RUN)
    assert caplog.text.count("nothing more is deleted") == 1
    assert store.recording


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "koopmon-test", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.process
def test_a_disk_that_is_really_full_pauses_and_resumes_by_itself(
    small_disk: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    path = small_disk / "history.sqlite3"
    store = HistoryWriter.open(path, clock=clock)
    decide(store, 0)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    fill(store, 20)
    for number in range(1, 4):
        decide(store, number)
    assert not store.recording
    clock.now += 31.0
    store.upkeep([RUN])
    assert not store.recording
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    ballast.unlink()
    clock.now += 31.0
    store.upkeep([RUN])
    assert store.recording, "without anything being written"
    decide(store, 4)
    assert ids(path) == [f"{number:08x}" for number in range(5)]
    store.close()


def test_what_waits_is_bounded_and_written_at_the_end(
    open_store: Callable[..., HistoryWriter], path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.history.journal.MAX_BACKLOG", 6)
    store = open_store()
    store._database.execute("PRAGMA query_only = ON")
    for number in range(5):  # two records each
        decide(store, number)
    assert not store.recording
    assert store.take_lost() == 4
    assert store.take_lost() == 0
    store._database.execute("PRAGMA query_only = OFF")
    store.close()
    assert ids(path) == ["00000002", "00000003", "00000004"]


def damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:100] = os.urandom(100)
    path.write_bytes(data)


def damage_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for page in range(4096, len(data), 4096):
        data[page : page + 64] = b"\xff" * 64
    path.write_bytes(data)


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(4096)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("harm", [damage_header, damage_pages, cut, zero])
def test_a_damaged_store_is_kept_beside_a_new_one_and_said_in_one_line(
    harm: Callable[[Path], None], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = HistoryWriter.open(path)
    decide(store, 0)
    fill(store, 3)
    store.close()
    harm(path)
    bad = path.read_bytes()
    store = HistoryWriter.open(path)
    decide(store, 1)
    store.close()
    assert ids(path) == ["00000001"]
    (kept,) = path.parent.glob("*.damaged-*")
    assert kept.read_bytes() == bad
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert kept.name in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_store_that_lost_all_but_its_log_is_kept(path: Path) -> None:
    store = HistoryWriter.open(path)
    decide(store, 0)
    log = path.with_name(path.name + "-wal").read_bytes()
    store.close()
    path.write_bytes(b"")
    path.with_name(path.name + "-wal").write_bytes(log)
    HistoryWriter.open(path).close()
    (kept,) = path.parent.glob("*.damaged-*-wal")
    assert kept.read_bytes() == log


def test_a_store_that_goes_bad_or_goes_away_while_it_is_written(
    open_store: Callable[..., HistoryWriter], path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    decide(store, 0)
    store._pause(sqlite3.DatabaseError("malformed"), damaged=True)
    decide(store, 1)
    keep_up(store, clock, RUN)
    assert store.recording
    assert ids(path) == ["00000001"]
    (kept,) = path.parent.glob("*.damaged-*[0-9]")
    assert ids(kept) == ["00000000"]
    path.rename(path.with_name("elsewhere.sqlite3"))
    keep_up(store, clock, RUN)
    decide(store, 2)
    assert ids(path) == ["00000002"]
    assert "moved or removed" in caplog.text


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("prunes", [True, False])
def test_a_file_that_is_emptied_while_it_is_written_is_kept_beside_a_new_one(
    open_store: Callable[..., HistoryWriter],
    path: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    size: int,
    prunes: bool,
) -> None:
    """SQLite deletes the log of an empty file at the next start: all that was recorded would be lost in silence."""
    store = open_store()
    decide(store, 0)
    if prunes:
        keep_up(store, clock, RUN)
    os.truncate(path, size)
    keep_up(store, clock, RUN)
    assert "was emptied" in caplog.text
    assert store.recording
    decide(store, 1)
    assert ids(path) == ["00000001"]
    assert len(list(path.parent.glob("*.damaged-*[0-9]"))) == 1


@pytest.mark.parametrize("removed", [("-wal",), ("-wal", "-shm")])
def test_a_log_that_is_removed_costs_no_record(
    open_store: Callable[..., HistoryWriter],
    path: Path,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    removed: tuple[str, ...],
) -> None:
    """A cleaner or a restored backup removes SQLite's companion files while the monitor writes."""
    store = open_store()
    decide(store, 0)
    keep_up(store, clock, RUN)
    for suffix in removed:
        path.with_name(path.name + suffix).unlink()
    decide(store, 1)
    keep_up(store, clock, RUN)
    decide(store, 2)
    assert caplog.text.count("its log (-wal) was removed") == 1
    copy = path.with_name("copy.sqlite3")  # as after a kill: without the writer's memory
    for suffix in ("", "-wal"):
        copy.with_name(copy.name + suffix).write_bytes(path.with_name(path.name + suffix).read_bytes())
    assert ids(copy) == ["00000000", "00000001", "00000002"]


def test_a_directory_that_is_removed_is_made_again(tmp_path: Path, clock: Clock) -> None:
    directory = tmp_path / "state"
    path = directory / "history.sqlite3"
    store = HistoryWriter.open(path, clock=clock)
    decide(store, 0)
    keep_up(store, clock, RUN)
    shutil.rmtree(directory)
    for number in range(1, 4):
        keep_up(store, clock, RUN)
        decide(store, number)
    assert store.recording
    assert ids(path) == ["00000001", "00000002", "00000003"]
    with pytest.raises(StoreError, match="in use by another monitor"):
        HistoryWriter.open(path)
    store.close()


def test_a_directory_that_another_monitor_made_again_has_one_writer(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "state" / "history.sqlite3"
    store = HistoryWriter.open(path, clock=clock)
    decide(store, 0)
    shutil.rmtree(path.parent)
    other = HistoryWriter.open(path)
    for _ in range(3):
        keep_up(store, clock, RUN)
        assert not store.recording
    other.close()
    keep_up(store, clock, RUN)
    assert store.recording
    store.close()
    HistoryWriter.open(path).close()


@pytest.mark.parametrize("link", ["symbolic", "hard", "directory"])
def test_one_file_has_one_writer_under_every_name(
    open_store: Callable[..., HistoryWriter], path: Path, link: str
) -> None:
    open_store()
    other = path.with_name("other.sqlite3")
    if link == "symbolic":
        other.symlink_to(path)
    elif link == "hard":
        other.hardlink_to(path)
    else:
        path.with_name("there").symlink_to(path.parent)
        other = path.parent / "there" / path.name
    with pytest.raises(StoreError, match=r"in use by another monitor|has a second name"):
        HistoryWriter.open(other)


def test_files_of_a_history_are_private(open_store: Callable[..., HistoryWriter], path: Path) -> None:
    path.parent.chmod(0o755)
    decide(open_store(), 0)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == dict.fromkeys((path.name + suffix for suffix in ("", "-wal", "-shm", ".lock")), 0o600)


def test_a_lock_file_that_is_a_link_harms_no_other_file(path: Path) -> None:
    precious = path.with_name("precious")
    precious.write_text("precious")
    path.with_name(path.name + ".lock").symlink_to(precious)
    with pytest.raises(StoreError, match="choose another place"):
        HistoryWriter.open(path)
    assert precious.read_text() == "precious"


def test_a_writer_elsewhere_pauses_recording_until_it_is_done(
    open_store: Callable[..., HistoryWriter], path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.history.database.BUSY_SECONDS", 0.01)
    store = open_store()
    decide(store, 0)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    decide(store, 1)
    assert not store.recording
    for _ in range(3):
        keep_up(store, clock, RUN)
        assert not store.recording
    other.execute("ROLLBACK")
    other.close()
    keep_up(store, clock, RUN)
    assert store.recording
    assert ids(path) == ["00000000", "00000001"]


def test_an_answer_counts_for_its_own_run_and_once(open_store: Callable[..., HistoryWriter], path: Path) -> None:
    store = open_store()
    store.record_hello(NOW, hello(OTHER))
    command = Command(run=RUN, incarnation=FIRST, id="0" * 8, kind="stop", reason="", expires_step=1)
    store.record_decision(NOW, RUN, FIRST, 1, phase="alert", reason="", risk=0.5, commands=[command], outcome="pending")
    forged = Ack(run=OTHER, incarnation=FIRST, command_id="0" * 8, outcome="refused", step=1, applied=Applied())
    store.record_ack(NOW, forged)
    assert count(path, "acks") == 0
    for _ in range(3):
        store.record_ack(
            NOW, Ack(run=RUN, incarnation=FIRST, command_id="0" * 8, outcome="applied", step=1, applied=Applied())
        )
        store.record_ack(
            NOW, Ack(run=RUN, incarnation=FIRST, command_id="f" * 8, outcome="applied", step=1, applied=Applied())
        )
    assert count(path, "acks") == 1
    with HistoryReader.open(path) as history:
        ((row,),) = [decision.commands for decision in history.decisions(RUN)]
    assert row.outcome == "applied"


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("UPDATE profiles SET profile = x'00'", "profiles"),
        ("UPDATE observations SET risk = 'high'", "observations"),
        ("UPDATE observations SET observation = '[[['", "observations"),
        ("UPDATE commands SET command = '{}'", "decisions"),
        ("UPDATE heartbeats SET loss = 'much'", "heartbeats"),
        ("UPDATE incarnations SET hello = 7", "incarnations"),
    ],
)
def test_rows_that_no_store_of_ours_holds_are_one_line(path: Path, statement: str, table: str) -> None:
    store = HistoryWriter.open(path)
    store.record_hello(NOW, hello(RUN))
    decide(store, 0)
    fill(store, 1)
    store.close()
    database = sqlite3.connect(path)
    database.execute(statement)
    database.commit()
    database.close()
    with (
        HistoryReader.open(path) as history,
        pytest.raises(StoreError, match=f"{table}: a row cannot be") as caught,
    ):
        list(getattr(history, table)(RUN))
    assert "\n" not in str(caught.value)


def test_damage_whose_description_is_no_text_is_damage_all_the_same(path: Path) -> None:
    """SQLite quotes the invalid text of a table in its message, and Python cannot decode it; found by fuzzing."""
    HistoryWriter.open(path).close()
    data = path.read_bytes()
    assert b"CREATE TABLE acks" in data
    path.write_bytes(data.replace(b"CREATE TABLE acks", b"CREATE \xdf\xff\xdfLE acks"))
    with pytest.raises(StoreError) as caught:
        HistoryReader.open(path)
    assert str(caught.value).isprintable()
    HistoryWriter.open(path).close()
    assert len(list(path.parent.glob("*.damaged-*"))) == 1


TABLES = ("runs", "incarnations", "profiles", "observations", "decisions", "commands", "acks", "heartbeats")


@pytest.mark.parametrize("table", TABLES)
def test_a_missing_column_is_one_line_for_the_reader_and_no_end_of_the_monitor(tmp_path: Path, table: str) -> None:
    """A damaged schema inside the file can name other columns than ours; found by fuzzing."""
    template = tmp_path / "template.sqlite3"
    store = HistoryWriter.open(template)
    store.record_hello(NOW, hello(RUN))
    decide(store, 0)
    fill(store, 1)
    store.close()
    with contextlib.closing(sqlite3.connect(template)) as database:
        columns = [column[1] for column in database.execute(f"PRAGMA table_info({table})")]
    refusals: list[str] = []
    for column in columns:
        path = tmp_path / f"{column}.sqlite3"
        path.write_bytes(template.read_bytes())
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute(f"ALTER TABLE {table} RENAME COLUMN {column} TO other")
            database.commit()
        with HistoryReader.open(path) as history:
            for rows in ("incarnations", "profiles", "observations", "decisions", "heartbeats"):
                try:
                    list(getattr(history, rows)(RUN))
                except StoreError as error:
                    refusals.append(str(error))
        store = HistoryWriter.open(path)
        store.record_hello(NOW, hello(RUN, SECOND))
        decide(store, 1)
        fill(store, 1)
        store.close()
    assert refusals
    assert all(refusal.isprintable() for refusal in refusals)


def _replace_by_a_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _replace_by_a_directory(path: Path, _: Path) -> None:
    path.mkdir()


def _replace_by_a_link(path: Path, other: Path) -> None:
    other.touch()
    path.symlink_to(other)


def _replace_by_a_link_to_nothing(path: Path, other: Path) -> None:
    path.symlink_to(other)


@pytest.mark.parametrize(
    "replace",
    [_replace_by_a_pipe, _replace_by_a_directory, _replace_by_a_link, _replace_by_a_link_to_nothing],
)
def test_a_store_that_is_replaced_by_no_file_pauses_until_it_is_gone(
    path: Path,
    tmp_path: Path,
    clock: Clock,
    open_store: Callable[..., HistoryWriter],
    caplog: pytest.LogCaptureFixture,
    replace: Callable[[Path, Path], None],
) -> None:
    store = open_store()
    decide(store, 0)
    for each in tmp_path.glob(f"{path.name}*"):
        if each.suffix != ".lock":
            each.rename(tmp_path / f"kept-{each.name}")
    other = tmp_path / "other"
    replace(path, other)
    keep_up(store, clock, RUN)
    assert not store.recording
    decide(store, 1)
    assert caplog.text.count("still paused: ") == 1
    assert "regular file" in caplog.text
    assert not other.exists() or not other.stat().st_size, "the file of another is left alone"
    path.rmdir() if path.is_dir() else path.unlink()
    keep_up(store, clock, RUN)
    assert store.recording
    store.close()
    assert ids(path)[-1] == command(1).id


def test_a_store_that_is_replaced_while_recording_is_paused_is_begun_anew(
    path: Path, clock: Clock, open_store: Callable[..., HistoryWriter]
) -> None:
    store = open_store()
    decide(store, 0)
    store._pause(sqlite3.OperationalError("disk I/O error"))
    for each in path.parent.glob(f"{path.name}*"):
        if each.suffix != ".lock":
            each.unlink()
    decide(store, 1)
    keep_up(store, clock, RUN)
    assert store.recording
    store.close()
    assert ids(path) == [command(1).id]


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_a_store_that_is_no_file_is_refused_at_once(path: Path, kind: str) -> None:
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/null")
    with pytest.raises(StoreError, match="regular file"):
        HistoryWriter.open(path)


@pytest.mark.parametrize("linked", [False, True])
def test_a_store_that_moves_while_it_is_open_has_one_writer(
    path: Path, tmp_path: Path, open_store: Callable[..., HistoryWriter], linked: bool
) -> None:
    """As to a larger disk, with a link in the old place. The lock file of the new place is free."""
    store = open_store()
    decide(store, 0)
    (tmp_path / "large").mkdir()
    moved = tmp_path / "large" / path.name
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).rename(moved.with_name(moved.name + suffix))
    if linked:
        path.symlink_to(moved)
    with pytest.raises(StoreError, match="in use by another monitor under another name"):
        HistoryWriter.open(moved)
    with pytest.raises(StoreError, match="in use by another monitor under another name"):
        remove_run(moved, RUN)
    assert not moved.with_name(f"{moved.name}.lock").exists()
    decide(store, 1)
    store.close()
    HistoryWriter.open(moved).close()
    assert ids(moved) == [command(0).id, command(1).id]


@pytest.mark.process
def test_a_store_that_is_mounted_under_a_second_name_has_one_writer(
    path: Path, tmp_path: Path, open_store: Callable[..., HistoryWriter]
) -> None:
    store = open_store()
    decide(store, 0)
    second = tmp_path / "second.sqlite3"
    second.touch()
    mounted = subprocess.run(["mount", "--bind", str(path), str(second)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    try:
        with pytest.raises(StoreError, match="in use by another monitor under another name"):
            HistoryWriter.open(second)
    finally:
        subprocess.run(["umount", str(second)], check=True)
