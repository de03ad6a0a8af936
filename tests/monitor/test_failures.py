"""A failure of one run affects no other run.

Two runs go through the same script in a service without sockets. The test repeats it for each method that the monitor
calls for a run, with an exception for the run `bad`. The commands and all series of `good` must stay the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from koopmon import policy
from koopmon.history.writer import HistoryWriter
from koopmon.logs import MINUTE
from koopmon.monitor import channels, daemon
from koopmon.monitor.assembler import Assembler
from koopmon.monitor.failures import Failures
from koopmon.monitor.history_sink import HistorySink
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.log_sink import LogSink
from koopmon.monitor.metrics_sink import MetricsSink
from koopmon.monitor.pending_commands import PendingCommands
from koopmon.monitor.registry import RunRegistry
from koopmon.monitor.run import Peer, Run
from koopmon.monitor.run_controller import RunController
from koopmon.monitor.service import Service
from koopmon.telemetry.metrics import Metrics
from koopmon.wire.messages import Refused, Welcome
from tests.monitor.world import BAD, GOOD, QueueEngine, World

httpx = pytest.importorskip("httpx")


def concerns_bad(value: Any) -> bool:
    """Return True if an argument of a call belongs to the run `bad`."""
    names = [value, *(getattr(value, name, None) for name in ("run", "name", "identity"))]
    inner = [getattr(value, name, None) for name in ("snapshot", "_hello", "command")]
    inner += getattr(value, "_pending", {}).values()
    if isinstance(value, tuple):
        inner += list(value)
    return any(name in (BAD, BAD.encode()) for name in names if isinstance(name, (str, bytes))) or any(
        concerns_bad(each) for each in inner if each is not None
    )


def public(cls: type[Any], *left_out: str) -> list[tuple[type[Any], str]]:
    names = [name for name, value in vars(cls).items() if callable(value) and not name.startswith("_")]
    return [(cls, name) for name in names if name not in left_out]


CALLS: list[tuple[type[Any], str]] = [
    *public(HistoryWriter),
    *public(LiveState, "names", "view", "views", "backfill"),
    *public(Metrics, "collect", "exposition", "observe_duration"),
    *public(RunController),
    *public(PendingCommands),
    *public(Peer),
    *public(Run, "lead_steps"),
    *public(RunRegistry, "get", "expire", "next_deadline", "remove"),
    *public(QueueEngine),
    *public(World, "says", "hello", "shard", "results", "handle", "commands", "series", "internal_errors", "play"),
    *((Assembler, name) for name in ("add", "_close")),
    *((RunController, name) for name in ("__init__", "_command", "_update_policy", "_decide")),
    *((sink, "__call__") for sink in (HistorySink, MetricsSink, LiveState, LogSink)),
]
NEVER_FOR_ONE_RUN = {
    (HistoryWriter, "record_outcome"),
    (RunController, "stand_down"),
    (PendingCommands, "abandon"),
    (Metrics, "value"),
    (Metrics, "gauges"),
}
"""Methods that this script does not call, or only without a run."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    world = World(tmp_path_factory.mktemp("world") / "history.sqlite3")
    seen = world.play()
    world.store.close()
    assert world.internal_errors() == 0.0
    assert not world.errors
    kinds = {type(message).__name__ for message in world.sent[GOOD]}
    assert kinds == {"Welcome", "HeartbeatReply", "Command"}
    assert len(world.commands(GOOD)) >= 4
    assert world.told
    return seen


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[0].__name__}.{call[1]}")
def test_what_raises_for_one_run_touches_no_other(
    call: tuple[type[Any], str],
    undisturbed: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cls, name = call
    real, raised = getattr(cls, name), 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal raised
        if any(concerns_bad(value) for value in (*args, *kwargs.values())):
            raised += 1
            raise ZeroDivisionError("on purpose")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="koopmon"):
        patch.setattr(cls, name, broken)
        world = World(tmp_path / "history.sqlite3")
        seen = world.play()
    world.store.close()
    assert seen == undisturbed
    if call in NEVER_FOR_ONE_RUN:
        return
    assert raised, "the script does not come by it"
    assert world.internal_errors() > 0 or world.errors, "never silently"
    assert world.errors or any("ZeroDivisionError" in (record.exc_text or "") for record in caplog.records)


@pytest.mark.parametrize("name", ["expire", "due", "mark_sent"])
def test_a_run_whose_commands_cannot_be_handled_is_only_watched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(tmp_path / "history.sqlite3")
    real = getattr(PendingCommands, name)

    def broken(pending: PendingCommands, *args: Any) -> Any:
        if concerns_bad(pending):
            raise ZeroDivisionError("on purpose")
        return real(pending, *args)

    monkeypatch.setattr(PendingCommands, name, broken)
    for run in (BAD, GOOD):
        world.hello(run)
        world.shard(run, 1)
    world.results(finite=False)
    world.service.tick()
    left = len(world.commands(BAD))
    monkeypatch.undo()  # a failed part is not used again
    for step in (50, 100):
        for run in (BAD, GOOD):
            world.hello(run)
            world.shard(run, step)
        world.results(finite=False)
        world.now += 1.1
        world.service.tick()
    assert len(world.commands(BAD)) == left
    assert len(world.commands(GOOD)) > left
    bad, good = world.board.view(BAD), world.board.view(GOOD)
    assert bad is not None
    assert good is not None
    assert (bad.sends, good.sends) == (False, True)
    assert world.series(BAD)["koopmon_risk", ("run", BAD)] == 1.0, "it is watched all the same"
    assert "run bad: command: ZeroDivisionError: on purpose: from now on this run is only watched" in caplog.text
    world.store.close()


def test_a_run_that_cannot_be_taken_in_is_refused_and_may_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "history.sqlite3")
    with monkeypatch.context() as patch:
        patch.setattr(Service, "_begin", lambda *_, **__: 1 / 0)
        world.hello(BAD)
        world.service.tick()
    (refused,) = world.sent[BAD]
    assert isinstance(refused, Refused)
    assert "error in the monitor" in refused.reason
    world.shard(BAD, 1)
    world.service.tick()
    assert not world.errors
    world.hello(BAD)
    assert isinstance(world.sent[BAD][-1], Welcome)
    world.store.close()


def test_a_decision_that_cannot_be_recorded_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "history.sqlite3")
    monkeypatch.setattr(HistoryWriter, "record_decision", lambda *_, **__: 1 / 0)
    world.hello(GOOD)
    world.shard(GOOD, 1)
    world.results(finite=False)
    world.service.tick()
    assert world.commands(GOOD) == []
    world.store.close()


def test_an_error_is_logged_once_a_minute_for_each_run_and_part_and_counted_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    metrics = Metrics(CollectorRegistry(), {})
    failures = Failures(metrics, lambda: now[0])

    def fail(run: str, count: int) -> None:
        for _ in range(count):
            with failures.contained("store", run):
                raise ZeroDivisionError("on purpose")

    fail("a", 5)
    fail("b", 1)
    assert [record.getMessage() for record in caplog.records] == [
        "run a: store: ZeroDivisionError: on purpose",
        "run b: store: ZeroDivisionError: on purpose",
    ]
    now[0] += MINUTE
    fail("a", 1)
    assert caplog.records[-1].getMessage().endswith("on purpose (4 more since the last such line)")
    assert caplog.records[-1].exc_info is not None
    assert metrics.value("internal_errors", "store") == 7


def test_a_loop_that_fails_goes_on_and_says_so(
    start_monitor: Callable[..., Any],
    connect: Callable[..., Any],
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    assert isinstance(agent.hello(), Welcome)
    loop = 'internal_errors_total{part="loop"}'
    for owner, name in ((Service, "tick"), (Service, "next_deadline"), (daemon.Monitor, "_note_refusals")):
        before = monitor.samples()[loop]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            until(lambda before=before: monitor.samples()[loop] > before)
            agent.heartbeat(1)
    agent.snapshot(2)
    until(lambda: monitor.sample('risk{run="job"}') is not None)
    assert httpx.get(f"http://{monitor.addresses.http}/healthz", timeout=30.0).status_code == 200


def test_a_loop_that_cannot_wait_is_not_healthy(
    start_monitor: Callable[..., Any], until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monitor = start_monitor()
    page = f"http://{monitor.addresses.http}/healthz"
    monkeypatch.setattr(daemon, "ALIVE_SECONDS", 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(channels.Poller, "wait", fail)
        until(lambda: httpx.get(page, timeout=30.0).status_code == 503)
        seen = monitor.samples()['internal_errors_total{part="loop"}']
        assert seen < 1000, "it does not spin"
    monkeypatch.setattr(daemon, "ALIVE_SECONDS", 10.0)
    until(lambda: httpx.get(page, timeout=30.0).status_code == 200)


def test_what_cannot_be_encoded_is_no_peers_mistake(
    start_monitor: Callable[..., Any],
    connect: Callable[..., Any],
    until: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    absurd = policy.Action(kind="set_lr_scale", reason="on purpose", lr_scale=2.0)
    real = policy.decide

    def decide(*args: Any) -> policy.Decision:
        decision = real(*args)
        return policy.Decision(state=replace(decision.state, phase="acting"), commands=(absurd,), reason="on purpose")

    command = 'internal_errors_total{part="command"}'
    with monkeypatch.context() as patch:
        patch.setattr(policy, "decide", decide)
        agent.snapshot(1)
        until(lambda: monitor.samples()[command] == 1)
    samples = monitor.samples()
    assert samples['messages_rejected_total{reason="schema"}'] == 0
    assert samples['commands_issued_total{kind="set_lr_scale",run="job"}'] == 0
    agent.heartbeat(2, dropped={"not_finite": 1})
    assert agent.expect_command("set_lr_scale").lr_scale == 0.25
    monitor.stop()
    with monitor.history() as history:
        assert {row.command.lr_scale for each in history.decisions("job") for row in each.commands} <= {0.25, None}
