"""Earlier launches of a run: each rule holds for the launches in memory, and for those read from the file again."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from koopmon.history import launches as kept
from koopmon.history.launches import Launches
from koopmon.history.schema import RunState
from koopmon.history.writer import HistoryWriter
from koopmon.wire.messages import Applied, KssSettings
from tests.factories import ack, hello

RUN, FIRST, SECOND, THIRD = "job", "aaaaaaaa", "bbbbbbbb", "cccccccc"
HELD = Applied(lr_scale=0.25)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[HistoryWriter]:
    store = HistoryWriter.open(path)
    yield store
    store.close()


@pytest.fixture(params=["in memory", "from the file"])
def launches(request: pytest.FixtureRequest, store: HistoryWriter, path: Path) -> Callable[[], Launches]:
    def look() -> Launches:
        if request.param == "in memory":
            return store.launches
        store.commit()
        with contextlib.closing(sqlite3.connect(path)) as database:
            return Launches.read(database)

    return look


Look = Callable[[], Launches]


def test_what_to_restore_is_the_latest_other_incarnation(store: HistoryWriter, launches: Look) -> None:
    kss = Applied(lr_scale=0.25, kss=KssSettings(alpha=0.3))
    assert launches().last_applied(RUN, other_than=FIRST) is None
    store.record_hello(1.0, hello())
    store.record_applied(2.0, RUN, FIRST, 20, kss)
    store.record_hello(3.0, hello(incarnation=SECOND))
    assert launches().last_applied(RUN, other_than=SECOND) == kss
    assert launches().last_applied(RUN, other_than=FIRST) is None
    assert launches().incarnations(RUN) == [FIRST, SECOND]
    assert launches().incarnations("another") == []


def test_what_to_restore_skips_launches_without_a_step_and_ends_with_a_goodbye(
    store: HistoryWriter, launches: Look
) -> None:
    store.record_hello(1.0, hello())
    store.record_applied(2.0, RUN, FIRST, 20, HELD)
    store.record_state(3.0, RUN, FIRST, RunState.VANISHED)
    store.record_hello(4.0, hello(incarnation=SECOND))
    store.record_applied(5.0, RUN, SECOND, 0, Applied())
    assert launches().last_applied(RUN, other_than=THIRD) == HELD, "the second was killed before its first step"
    store.record_applied(6.0, RUN, SECOND, 9, Applied())
    assert launches().last_applied(RUN, other_than=THIRD) == Applied(), "it had come back to the user's own"
    store.record_applied(7.0, RUN, SECOND, 30, HELD)
    assert launches().last_applied(RUN, other_than=THIRD) == HELD
    store.record_state(8.0, RUN, SECOND, RunState.ENDED, end_reason="goodbye")
    assert launches().last_applied(RUN, other_than=THIRD) is None, "not even that of the first launch"


def test_an_ack_has_the_values_in_force_too(store: HistoryWriter, launches: Look) -> None:
    store.record_hello(1.0, hello())
    store.record_ack(2.0, ack(applied=HELD))
    assert launches().last_applied(RUN, other_than=SECOND) == HELD


def test_a_rank_that_comes_back_after_the_end_reopens_its_launch(store: HistoryWriter, launches: Look) -> None:
    store.record_hello(1.0, hello())
    store.record_applied(2.0, RUN, FIRST, 20, HELD)
    store.record_state(3.0, RUN, FIRST, RunState.ENDED, end_reason="goodbye")
    store.record_hello(4.0, hello(process_rank=1))
    assert launches().last_applied(RUN, other_than=SECOND) is None
    store.record_hello(4.0, hello())
    assert launches().last_applied(RUN, other_than=SECOND) == HELD


def test_the_memory_is_that_of_the_latest_launch(store: HistoryWriter, launches: Look) -> None:
    assert launches().memory(RUN, FIRST) is None
    store.record_memory(1.0, RUN, FIRST, b"one")
    store.record_memory(1.0, RUN, FIRST, b"two")
    assert launches().memory(RUN, FIRST) == b"two"
    store.record_memory(1.0, "other", FIRST, b"other")
    store.record_memory(1.0, RUN, SECOND, b"three")
    assert launches().memory(RUN, SECOND) == b"three"
    assert launches().memory("other", FIRST) == b"other"


def test_launches_and_runs_are_bounded(
    store: HistoryWriter, launches: Look, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.setattr(kept, "MAX_LAUNCHES", 3)
    for number in range(5):
        store.record_hello(float(number), hello(incarnation=f"{number:08x}"))
    assert launches().incarnations(RUN) == [f"{number:08x}" for number in (2, 3, 4)]
    monkeypatch.setattr(kept, "MAX_RUNS", 2)
    store.record_hello(6.0, hello("second"))
    store.record_hello(7.0, hello(incarnation=THIRD))
    store.record_hello(8.0, hello("third"))
    assert [launches().incarnations(run)[-1:] for run in (RUN, "third")] == [[THIRD], [FIRST]]
    assert len(store.launches._runs) == 2


@pytest.mark.parametrize(
    "change",
    [
        "applied = '['",
        "applied = 7",
        "applied_step = 'many'",
        "incarnation = 5",
        "incarnation = x'ff'",
        "memory = 'text'",
        "memory = 5",
        "ended = 'yes'",
    ],
)
def test_a_forged_launch_ends_no_monitor(store: HistoryWriter, path: Path, change: str) -> None:
    store.record_hello(1.0, hello())
    store.record_applied(2.0, RUN, FIRST, 20, HELD)
    store.record_hello(1.0, hello("other"))
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"UPDATE incarnations SET {change} WHERE run_id = 1")
        database.commit()
    again = HistoryWriter.open(path)
    found: list[Any] = [again.launches.last_applied(RUN, other_than=THIRD), again.launches.memory(RUN, FIRST)]
    assert found[0] in (None, HELD)
    assert found[1] is None
    assert again.launches.incarnations("other") == [FIRST]
    again.close()
