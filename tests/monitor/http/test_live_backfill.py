"""A restarted monitor shows the runs of its history and continues them."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon.history.writer import HistoryWriter
from koopmon.monitor.http import live_backfill as recalls
from koopmon.monitor.http.live_backfill import LiveBackfill
from koopmon.monitor.http.live_state import LiveState
from koopmon.wire.messages import Applied
from tests.factories import record_observation

httpx = pytest.importorskip("httpx")

Start = Callable[..., Any]
Until = Callable[[Callable[[], Any]], Any]


def ask(monitor: Any, path: str) -> Any:
    return httpx.get(f"http://{monitor.addresses.http}{path}", timeout=30.0).json()


def test_after_a_restart_the_page_is_not_empty(start_monitor: Start, connect: Start, until: Until) -> None:
    first = start_monitor()
    agent = connect(first.addresses.endpoint)
    agent.hello(hostname="node-3")
    for step in range(1, 6):
        agent.snapshot(step)
        until(lambda: first.sample("dmd_duration_seconds_count") == step)  # noqa: B023
    agent.snapshot(6, torch.full((4, 96, 12), math.nan).bfloat16())
    command = agent.expect_command("set_lr_scale")
    held = Applied(lr_scale=command.lr_scale)
    agent.acknowledge(command, "applied", held, step=7)
    until(lambda: ask(first, "/api/v1/runs/job")["decisions"][-1]["commands"][-1]["outcome"] == "applied")
    before = ask(first, "/api/v1/runs/job")
    assert [point["step"] for point in before["points"]] == [1, 2, 3, 4, 5, 6]
    first.stop()

    second = start_monitor(bind=first.addresses.endpoint)
    after = until(
        lambda: len((found := ask(second, "/api/v1/runs/job")).get("layers", {}).get("steps", ())) == 5 and found
    )
    assert after["state"] in ("recorded", "running")
    assert (after["adapter"], after["lr_scale"]) == ("transformer", command.lr_scale)
    assert after["layers"].pop("steps") == before["layers"].pop("steps")
    for name, rows in before["layers"].items():
        assert after["layers"][name] == [pytest.approx(row, rel=2e-5) for row in rows]
    for row in (*before["decisions"], *after["decisions"], *before["points"], *after["points"]):
        del row["time"]  # the page and the history read the clock one after the other
    assert after["decisions"] == before["decisions"]
    assert after["points"] == [pytest.approx(point) for point in before["points"]]
    assert after["spectrum"]["step"] == 5
    for one, other in zip(after["spectrum"].pop("eigenvalues"), before["spectrum"].pop("eigenvalues"), strict=True):
        assert one == [pytest.approx(pair, abs=2e-3) for pair in other]
    assert after["spectrum"] == before["spectrum"]
    assert "judged" in after["outlook"]["lines"][0]["then"]

    until(lambda: agent.control.connections == 2)
    agent.hello(step=6, applied=held)
    agent.snapshot(8)
    going_on = until(lambda: (found := ask(second, "/api/v1/runs/job"))["points"][-1]["step"] == 8 and found)
    assert [point["step"] for point in going_on["points"]] == [1, 2, 3, 4, 5, 6, 8]
    assert (going_on["state"], going_on["lr_scale"]) == ("running", command.lr_scale)
    assert going_on["outlook"]["lines"][-1]["if"] == "Budget"


def test_only_the_last_rows_are_read(
    start_monitor: Start, connect: Start, until: Until, monkeypatch: pytest.MonkeyPatch, store_path: Path
) -> None:
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    for step in range(1, 11):
        agent.snapshot(step)
        until(lambda: monitor.sample("dmd_duration_seconds_count") == step)  # noqa: B023
    heir = connect(monitor.addresses.endpoint, incarnation="bbbbbbbb")
    until(lambda: len(ask(monitor, "/api/v1/runs/job")["points"]) == 10)
    heir.hello(step=10)
    heir.snapshot(11)
    until(lambda: len(ask(monitor, "/api/v1/runs/job")["points"]) == 11)
    monitor.stop()
    with monitor.history() as history:
        assert [row.step for row in history.observations("job", last=3)] == [9, 10, 11]
        assert [row.incarnation[0] for row in history.profiles("job", last=2)] == ["a", "b"]
        assert [row.step for row in history.profiles("job", last=100)] == list(range(1, 12))
        assert list(history.decisions("none", last=5)) == []
        assert [row.name for row in history.recent_runs(5)] == ["job"]
    monkeypatch.setattr(recalls, "MAX_COLUMNS", 4)
    live_state = LiveState()
    recall = LiveBackfill(live_state, store_path)
    recall._thread.join(60.0)
    found = live_state.view("job")
    assert found is not None
    assert [column.step for column in found.columns] == [8, 9, 10, 11]
    assert found.incarnation == "bbbbbbbb"


def test_a_history_that_cannot_be_read_leaves_the_page_to_what_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "other.sqlite3"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE x (y)")
    database.close()
    live_state = LiveState()
    recall = LiveBackfill(live_state, path)
    recall._thread.join(60.0)
    recall.close()
    assert live_state.names() == []
    assert "not a koopmon store" in caplog.text


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "history.sqlite3"
    store = HistoryWriter.open(path)
    for run in ("bad", "good"):
        record_observation(store, 1.0, 1, run)
    store.close()
    with sqlite3.connect(path) as database:
        database.execute("UPDATE observations SET components = '[' WHERE incarnation_id = 1")
    database.close()
    live_state = LiveState()
    recall = LiveBackfill(live_state, path)
    recall._thread.join(60.0)
    recall.close()
    assert live_state.names() == ["good"]
    assert "of run bad is not shown" in caplog.text
