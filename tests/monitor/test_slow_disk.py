"""A monitor whose disk hangs: judgement, commands and answers go on, and the history is complete afterwards."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon.history import background_writer
from koopmon.history.journal import Journal
from koopmon.wire.messages import Applied, Welcome
from tests.monitor.conftest import WAIT_SECONDS

Start = Callable[..., Any]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing and committing hang while the event is not set, as on a file system that does not answer."""
    goes = threading.Event()
    goes.set()
    for name in ("_begin", "commit"):
        work: Callable[[Any], None] = getattr(Journal, name)

        def wait(self: Any, work: Callable[[Any], None] = work) -> None:
            assert goes.wait(WAIT_SECONDS)
            work(self)

        monkeypatch.setattr(Journal, name, wait)
    yield goes
    goes.set()


def explode(agent: Any, step: int) -> None:
    agent.snapshot(step, torch.full((4, 96, 12), math.nan).bfloat16())


def test_nothing_waits_for_a_disk_that_hangs(
    start_monitor: Start, connect: Start, until: Callable[..., Any], disk: threading.Event, store_path: Path
) -> None:
    first = start_monitor()
    agent = connect(first.addresses.endpoint)
    agent.hello()
    agent.snapshot(1)
    explode(agent, 2)
    kept = agent.expect_command("set_lr_scale")
    agent.acknowledge(kept, "applied", Applied(lr_scale=kept.lr_scale), step=3)
    until(lambda: first.sample('lr_scale{run="job"}') == kept.lr_scale)
    first.stop()

    disk.set()
    monitor = start_monitor(bind=first.addresses.endpoint)
    disk.clear()
    # The next launch of the same run: what the first one had in force is known without the disk.
    again = connect(monitor.addresses.endpoint, incarnation="bbbbbbbb")
    again.hello()
    (welcome,) = [message for message in again.seen if isinstance(message, Welcome)]
    assert welcome.restore == Applied(lr_scale=kept.lr_scale)
    other = connect(monitor.addresses.endpoint, run="other")
    other.hello()
    for step in (1, 2, 3):
        other.snapshot(step)
        other.heartbeat(step)
    until(lambda: monitor.sample('step{run="other"}') == 3)
    explode(other, 4)
    command = other.expect_command("set_lr_scale")
    other.acknowledge(command, "applied", Applied(lr_scale=command.lr_scale), step=5)
    until(lambda: monitor.sample('lr_scale{run="other"}') == command.lr_scale)
    with monitor.history() as history:
        assert "other" not in history.runs()
    disk.set()
    monitor.stop()
    with monitor.history() as history:
        steps = [row.step for row in history.profiles("other")]
        assert (steps[0], steps[-1]) == (1, 4)
        assert [row.step for row in history.observations("other")] == steps
        (decision,) = [row for row in history.decisions("other") if row.commands]
        assert {row.command.id: row.outcome for row in decision.commands}[command.id] == "applied"
    assert not list(store_path.parent.glob("*.damaged-*"))


def test_a_monitor_ends_in_time_while_its_disk_hangs(
    start_monitor: Start,
    connect: Start,
    disk: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(background_writer, "CLOSE_SECONDS", 0.1)
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    disk.clear()
    agent.hello()
    agent.snapshot(1)
    monitor.stop()
    assert "the disk does not answer" in caplog.text


def test_what_does_not_fit_is_counted(
    start_monitor: Start,
    connect: Start,
    until: Callable[..., Any],
    disk: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background_writer, "MAX_WAITING_BYTES", 4 * background_writer.RECORD_BYTES)
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    disk.clear()
    agent.hello()
    for step in (1, 2, 3):
        agent.snapshot(step)
    until(lambda: (monitor.sample("store_lost_total") or 0.0) >= 3.0)
    explode(agent, 4)
    assert agent.expect_command("set_lr_scale").lr_scale < 1.0
