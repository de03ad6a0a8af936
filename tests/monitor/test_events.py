"""Events reach every sink, the history first. A failing sink stops no other one, and no command is sent before it is on
disk.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from koopmon.config import MonitorConfig
from koopmon.history.reader import HistoryReader
from koopmon.monitor import events
from koopmon.monitor.failures import Failures
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.registry import RunRegistry
from koopmon.monitor.run import Run
from koopmon.telemetry.metrics import Metrics
from koopmon.wire.messages import Command, MonitorMessage
from tests import factories
from tests.monitor.world import BAD, GOOD, World

pytestmark = pytest.mark.usefixtures("one_snapshot_is_enough")

PARTS: tuple[Any, ...] = ("store", "metrics", "page", "annotation")


class Sinks:
    """Four sinks that record their events; the one named `broken` raises."""

    def __init__(self, broken: str = "") -> None:
        self.seen: list[tuple[str, float, events.Event]] = []
        self.broken = broken
        self.metrics = Metrics(CollectorRegistry(), {})
        failures = Failures(self.metrics, lambda: 0.0)
        self.publisher = events.Publisher([(part, self.sink(part)) for part in PARTS], failures, lambda: 12.5)

    def sink(self, part: str) -> events.Sink:
        def take(at: float, event: events.Event) -> None:
            self.seen.append((part, at, event))
            if part == self.broken:
                raise ZeroDivisionError("on purpose")

        return take

    @property
    def reached(self) -> list[str]:
        return [part for part, _, _ in self.seen]


def run() -> Run:
    return factories.admit(RunRegistry(MonitorConfig()), 0.0, factories.hello(), b"peer").run


def test_every_sink_gets_the_event_once_the_history_first() -> None:
    sinks, event = Sinks(), events.RunChanged(run())
    sinks.publisher.publish(event)
    assert sinks.seen == [(part, 12.5, event) for part in PARTS]


@pytest.mark.parametrize("broken", PARTS)
def test_a_sink_that_raises_is_counted_and_logged_once_and_stops_no_other(
    broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = Sinks(broken)
    for _ in range(3):
        sinks.publisher.publish(events.RunChanged(run()))
    assert sinks.reached == [*PARTS] * 3
    assert [sinks.metrics.value("internal_errors", part) for part in PARTS] == [
        3.0 * (part == broken) for part in PARTS
    ]
    (record,) = caplog.records
    assert record.getMessage() == f"run job: {broken}: ZeroDivisionError: on purpose"


def test_an_event_that_must_be_recorded_goes_no_further_without_the_history() -> None:
    sinks, event = Sinks("store"), events.Decided(run(), None)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        sinks.publisher.publish(event)
    assert sinks.reached == ["store"]
    other = Sinks("page")
    other.publisher.publish(event)
    assert other.reached == [*PARTS], "the page is not needed for a decision"


def test_a_decision_is_on_disk_before_its_first_command_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, recorded = tmp_path / "history.sqlite3", []

    def send(world: World, peer: bytes, message: MonitorMessage) -> bool:
        if isinstance(message, Command):
            with HistoryReader.open(path) as history:
                rows = [row for decision in history.decisions(GOOD) for row in decision.commands]
            recorded.append(message.id in [row.command.id for row in rows])
        return True

    monkeypatch.setattr(World, "send", send)
    world = World(path)
    world.hello(GOOD)
    world.shard(GOOD, 1)
    world.results(finite=False)
    world.store.close()
    assert recorded == [True, True], "back-off and cadence"


@pytest.mark.parametrize("owner", [Metrics, LiveState])
def test_what_cannot_be_shown_is_decided_and_sent_all_the_same(
    owner: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path / "history.sqlite3")
    world.hello(GOOD)
    world.hello(BAD)
    for name in [name for name in vars(owner) if name.startswith(("set", "__call__"))]:
        monkeypatch.setattr(owner, name, lambda *_, **__: 1 / 0)
    with caplog.at_level(logging.ERROR):
        for name in (BAD, GOOD):
            world.shard(name, 1)
        world.results(finite=False)
    world.store.close()
    assert {command.kind for command in world.commands(GOOD)} == {"set_lr_scale", "set_cadence"}
    assert world.internal_errors() > 0
    assert not world.errors
    with HistoryReader.open(tmp_path / "history.sqlite3") as history:
        assert [row.step for row in history.decisions(GOOD)] == [1]
