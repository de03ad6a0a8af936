"""A history behind a slow, full or locked disk: nothing waits for it, order is kept, and losses are counted."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from koopmon.config import StoreConfig
from koopmon.history import background_writer as module
from koopmon.history.background_writer import BackgroundWriter
from koopmon.history.journal import Journal
from koopmon.history.reader import HistoryReader
from tests.factories import ack, command, heartbeat, hello, noisy_profile, record_observation

RUN, FIRST = "job", "aaaaaaaa"
WAIT_SECONDS = 30.0


class Disk:
    """Holds each record of the writer's thread back while it is stopped."""

    def __init__(self) -> None:
        self.goes = threading.Event()
        self.goes.set()

    def stop(self) -> None:
        self.goes.clear()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite3"


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk on which the beginning of a transaction may hang."""
    disk, begin = Disk(), Journal._begin

    def wait(self: Journal) -> None:
        assert disk.goes.wait(WAIT_SECONDS)
        begin(self)

    monkeypatch.setattr(Journal, "_begin", wait)
    yield disk
    disk.goes.set()


@pytest.fixture
def open_store(path: Path, disk: Disk) -> Iterator[Callable[..., BackgroundWriter]]:
    stores: list[BackgroundWriter] = []

    def start(**options: Any) -> BackgroundWriter:
        stores.append(BackgroundWriter.open(path, StoreConfig(), **options))
        return stores[-1]

    yield start
    disk.goes.set()
    for store in stores:
        store.close()


def decide(store: BackgroundWriter, number: int) -> None:
    store.record_decision(
        1.0, RUN, FIRST, number, phase="alert", reason="", risk=0.5, commands=[command(number)], outcome="pending"
    )


def profile(store: BackgroundWriter, step: int, size: int = 100) -> None:
    columns = {"num_shards": 1, "masked": False, "seconds": 0.0}
    store.record_profile(1.0, RUN, FIRST, step, profile=noisy_profile(size), **columns)


def steps(path: Path) -> dict[str, list[int]]:
    with HistoryReader.open(path) as history:
        return {
            "decisions": [row.step for row in history.decisions(RUN)],
            "profiles": [row.step for row in history.profiles(RUN)],
            "observations": [row.step for row in history.observations(RUN)],
        }


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_decision_is_on_disk_when_its_record_returns(open_store: Callable[..., BackgroundWriter], path: Path) -> None:
    store = open_store()
    for number in range(20):
        profile(store, number)
        record_observation(store, 1.0, number)
        decide(store, number)
        assert steps(path) == {table: list(range(number + 1)) for table in ("decisions", "profiles", "observations")}


def test_a_record_without_a_decision_is_on_disk_after_the_commit(
    open_store: Callable[..., BackgroundWriter], path: Path
) -> None:
    store = open_store()
    profile(store, 1)
    store.commit()
    wait_until(lambda: steps(path)["profiles"] == [1])


def test_the_end_commits(open_store: Callable[..., BackgroundWriter], path: Path) -> None:
    store = open_store()
    profile(store, 1)
    store.close()
    assert steps(path)["profiles"] == [1]
    assert sorted(each.name for each in path.parent.iterdir()) == [path.name], "a store at rest is one file"


def test_a_log_that_is_removed_costs_no_record(
    open_store: Callable[..., BackgroundWriter], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    decide(store, 0)
    store.upkeep([RUN])
    wait_until(lambda: store._log_inode is not None)
    path.with_name(f"{path.name}-wal").unlink()
    profile(store, 1)
    store.upkeep([RUN])
    wait_until(lambda: "its log (-wal) was removed" in caplog.text)
    store.close()
    assert (steps(path)["decisions"], steps(path)["profiles"]) == ([0], [1])


def test_a_disk_that_hangs_holds_nothing_up_and_loses_no_record(
    open_store: Callable[..., BackgroundWriter], path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    store = open_store()
    wait_for = store._changed.wait_for

    def counted(condition: Callable[[], bool], timeout: float | None = None) -> bool:
        if timeout is not None:
            waits.append(timeout)
        return wait_for(condition, timeout)

    monkeypatch.setattr(store._changed, "wait_for", counted)
    disk.stop()
    store.record_hello(1.0, hello())
    for number in range(50):
        profile(store, number)
        decide(store, number)
        store.record_ack(1.0, ack(number))
        store.record_heartbeat(1.0, heartbeat(number))
        store.commit()
        store.upkeep([RUN])
    assert waits == [0.01], "one decision waited, and for its time alone"
    assert store.launches.incarnations(RUN) == [FIRST], "what was recorded is known at once"
    assert steps(path)["decisions"] == []
    disk.goes.set()
    wait_until(lambda: not store._is_behind)
    monkeypatch.setattr(module, "FLUSH_SECONDS", WAIT_SECONDS)
    decide(store, 50)
    assert steps(path)["decisions"] == list(range(51)), "in their order, and flushed again"
    store.close()
    assert steps(path)["profiles"] == list(range(50))
    assert store.take_lost() == 0
    with HistoryReader.open(path) as history:
        outcomes = [each.outcome for row in history.decisions(RUN) for each in row.commands]
    assert outcomes == [*["applied"] * 50, "pending"]


def test_a_full_queue_drops_profiles_first_counts_them_and_says_so_once(
    open_store: Callable[..., BackgroundWriter],
    path: Path,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 20 * module.RECORD_BYTES)
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    store = open_store(clock=lambda: 100.0)
    disk.stop()
    with caplog.at_level(logging.ERROR):
        profile(store, 0, size=10_000)  # larger than all others together
        for number in range(1, 30):
            record_observation(store, 1.0, number)
        for number in range(40):
            decide(store, number)
    assert [record.getMessage() for record in caplog.records] == [
        "store: the disk is too slow: records are left out, monitoring goes on"
    ]
    assert store._waiting_bytes <= module.MAX_WAITING_BYTES
    lost = store.take_lost()
    assert store.take_lost() == 0
    disk.goes.set()
    store.close()
    kept = steps(path)
    assert 0 < len(kept["observations"]) <= 10
    assert kept["decisions"] == list(range(len(kept["decisions"])))
    assert len(kept["decisions"]) >= 10
    assert lost == 70 - sum(map(len, kept.values()))


def test_a_disk_that_does_not_answer_is_not_recording(open_store: Callable[..., BackgroundWriter], disk: Disk) -> None:
    now = [100.0]
    store = open_store(clock=lambda: now[0])
    disk.stop()
    decide(store, 1)
    assert store.recording
    now[0] += module.STALLED_SECONDS + 1.0
    assert not store.recording
    disk.goes.set()
    wait_until(lambda: store.recording)


def test_the_end_waits_for_the_disk_within_its_time_alone(
    open_store: Callable[..., BackgroundWriter],
    path: Path,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)
    store = open_store()
    disk.stop()
    for number in range(3):
        decide(store, number)
    store.close()
    assert "the disk does not answer: 3 records" in caplog.text
    disk.goes.set()
    monkeypatch.setattr(module, "CLOSE_SECONDS", WAIT_SECONDS)
    store.close()
    assert steps(path)["decisions"] == [0, 1, 2]


def test_a_full_disk_pauses_and_resumes(open_store: Callable[..., BackgroundWriter], path: Path) -> None:
    now = [100.0]
    store = open_store(clock=lambda: now[0])
    decide(store, 0)
    store.flush()
    wait_until(lambda: store._done == store._added)
    database = store._database
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    database.execute(f"PRAGMA max_page_count = {pages}")
    profile(store, 1, size=500_000)
    wait_until(lambda: store._done == store._added and not store.recording)
    decide(store, 1)
    wait_until(lambda: store._done == store._added)
    assert steps(path)["decisions"] == [0]
    database.execute(f"PRAGMA max_page_count = {1 << 30}")
    now[0] += 31.0
    store.upkeep([RUN])
    wait_until(lambda: store.recording)
    assert steps(path)["decisions"] == [0, 1]
    assert store.take_lost() == 1, "the profile"


def test_a_lock_that_another_process_holds_delays_the_thread_alone(
    open_store: Callable[..., BackgroundWriter], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    store = open_store()
    decide(store, 0)
    wait_until(lambda: store._done == store._added)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for number in range(1, 10):
        decide(store, number)
    assert store._done < store._added
    other.execute("ROLLBACK")
    other.close()
    wait_until(lambda: steps(path)["decisions"] == list(range(10)))
    assert store.recording


def test_an_unexpected_error_ends_neither_the_thread_nor_the_history(
    open_store: Callable[..., BackgroundWriter], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, apply = open_store(), Journal._apply
    failing = [True]

    def fail(self: Journal, entry: Any) -> None:
        if failing[0]:
            raise MemoryError
        apply(self, entry)

    monkeypatch.setattr(Journal, "_apply", fail)
    decide(store, 0)
    wait_until(lambda: store._done == store._added)
    failing[0] = False
    decide(store, 1)
    store.close()
    assert steps(path)["decisions"] == [1]
    assert store.take_lost() == 1
