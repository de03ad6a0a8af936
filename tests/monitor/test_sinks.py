"""Each sink turns events into its output. The golden run has the combinations; these tests have the rules."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from koopmon.config import MonitorConfig
from koopmon.history.reader import HistoryReader
from koopmon.history.schema import RunState
from koopmon.history.writer import HistoryWriter
from koopmon.monitor import events
from koopmon.monitor.history_sink import COMMIT_SECONDS, HistorySink
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.log_sink import LogSink
from koopmon.monitor.metrics_sink import MetricsSink
from koopmon.monitor.pending_commands import Answered
from koopmon.monitor.registry import RunRegistry
from koopmon.monitor.run import Run
from koopmon.monitor.run_controller import Assessment
from koopmon.telemetry.metrics import KEPT_WHEN_VANISHED, Metrics
from koopmon.wire.messages import MAX_LOGGED, Command, LoggedScalar, TrainingStep
from tests import factories

pytestmark = pytest.mark.usefixtures("one_snapshot_is_enough")


def watched(**hello: Any) -> Run:
    return factories.admit(RunRegistry(MonitorConfig()), 0.0, factories.hello(**hello), b"peer").run


def alarm(run: Run) -> Assessment:
    """A snapshot with states that are not finite: the policy backs off."""
    return run.controller.assess(0.0, TrainingStep(step=3, loss=2.0), None, step=3)


def series(metrics: Metrics) -> dict[str, float]:
    """Return samples of runs, without the counters that are 0."""
    return {
        f"{sample.name.removeprefix('koopmon_')} {' '.join(list(sample.labels.values())[1:])}".strip(): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if "run" in sample.labels and (sample.value or not sample.name.endswith("_total"))
    }


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry(), {})


@pytest.mark.parametrize(("acts", "counted"), [(True, 0.0), (False, 1.0)])
def test_a_command_that_is_not_sent_counts_as_a_dry_run(acts: bool, counted: float, metrics: Metrics) -> None:
    run, sink = watched(acts=acts), MetricsSink(metrics)
    sink(0.0, events.RunChanged(run))
    assessment = alarm(run)
    for event in (events.Assessed(run, assessment), events.Decided(run, assessment)):
        sink(0.0, event)
    assert metrics.value("commands_settled", "job", "set_lr_scale", "dry_run") == counted
    assert metrics.value("risk", "job") == 1.0
    assert metrics.value("risk_alarms", "job") == 1.0
    assert metrics.value("informative", "job") == 0.0


def test_a_replaced_command_counts_with_its_late_ack_alone(metrics: Metrics) -> None:
    run, sink = watched(), MetricsSink(metrics)
    sink(0.0, events.RunChanged(run))
    sink(0.0, events.CommandUnanswered(run, factories.command(1), replaced=True))
    assert metrics.value("commands_settled", "job", "set_lr_scale", "unanswered") == 0.0
    sink(0.0, events.CommandUnanswered(run, factories.command(2)))
    assert metrics.value("commands_settled", "job", "set_lr_scale", "unanswered") == 1.0
    for counts, expected in ((False, 0.0), (True, 1.0)):
        sink(0.0, events.CommandAcked(run, factories.ack(1), Answered("set_lr_scale", first=True, counts=counts)))
        assert metrics.value("commands_settled", "job", "set_lr_scale", "applied") == expected


def test_a_vanished_run_keeps_few_series_and_gets_them_back_with_its_next_message(metrics: Metrics) -> None:
    run, sink = watched(), MetricsSink(metrics)
    for event in (events.RunChanged(run), events.SnapshotReceived(run), events.SnapshotDropped(run, "engine_failed")):
        sink(5.0, event)
    assert series(metrics)["snapshots_dropped_total engine_failed"] == 1.0
    run.state = RunState.VANISHED
    sink(6.0, events.RunClosed(run, ""))
    assert {name.split()[0] for name in series(metrics)} == KEPT_WHEN_VANISHED
    for event in (events.SnapshotReceived(run), events.SnapshotDropped(run, "engine_failed")):
        sink(7.0, event)
    states = {"run_state ended": 0.0, "run_state running": 0.0, "run_state vanished": 1.0}
    assert series(metrics) == {**states, "last_snapshot_timestamp_seconds": 5.0}
    run.state = RunState.RUNNING
    sink(8.0, events.RunChanged(run))
    assert (series(metrics)["run_state running"], metrics.value("snapshots_received", "job")) == (1.0, 0.0)
    sink(9.0, events.RunRemoved(run))
    assert series(metrics) == {}


def test_the_trainings_own_numbers_are_metrics_while_they_are_finite(metrics: Metrics) -> None:
    registry, sink = RunRegistry(MonitorConfig()), MetricsSink(metrics)
    for rank in (0, 1):
        run = factories.admit(registry, 0.0, factories.hello(process_rank=rank, num_senders=2), b"p%d" % rank).run

    def shown(rank: int, **fields: Any) -> dict[str, float]:
        registry.on_message(1.0, factories.heartbeat(5, process_rank=rank, **fields), b"p%d" % rank)
        sink(1.0, events.RunChanged(run))
        names = ("loss", "learning_rate", "gradient_norm", "step_seconds")
        return {name: value for name in names if (value := metrics.value(name, "job")) is not None}

    assert shown(0) == {}
    assert shown(0, loss=-2.0, learning_rate=0.1) == {"loss": -2.0, "learning_rate": 0.1}
    every = {"loss": 4.0, "learning_rate": 0.2, "grad_norm": 3.0, "step_seconds": 0.5}
    assert shown(1, **every) == {"loss": 1.0, "learning_rate": 0.2, "gradient_norm": 3.0, "step_seconds": 0.5}
    assert shown(0, loss=math.nan, grad_norm=math.inf, step_seconds=0.75) == {
        "learning_rate": 0.2,
        "step_seconds": 0.75,
    }


def test_logged_scalars_are_metrics_with_a_band_and_their_departures_are_counted(metrics: Metrics) -> None:
    registry, sink = RunRegistry(MonitorConfig()), MetricsSink(metrics)
    for rank in (0, 1):
        run = factories.admit(registry, 0.0, factories.hello(process_rank=rank, num_senders=2), b"p%d" % rank).run
    sink(0.0, events.RunChanged(run))

    def log(step: int, rank: int = 0, **values: float) -> None:
        logged = {name: LoggedScalar(step=step, value=value) for name, value in values.items()}
        heartbeat = factories.heartbeat(step, process_rank=rank, logged=logged)
        registry.on_message(1.0, heartbeat, b"p%d" % rank)
        readings = run.read_logged(heartbeat)
        sink(1.0, events.HeartbeatReceived(run, heartbeat, {}, False, False, readings))

    def shown(name: str) -> list[float | None]:
        return [metrics.value(each, "job", name) for each in ("logged_value", "band_low", "band_high")]

    for step in range(40):
        log(step, kl=1.0 + 0.1 * (step % 3))
        log(step, rank=1, kl=50.0, reward=float(step % 2))
    value, low, high = shown("kl")
    assert value == 1.0
    assert low is not None
    assert high is not None
    assert low < 1.0 < 1.2 < high < 50.0, "rank 0 is the lowest that logs kl"
    assert shown("reward")[0] == 1.0
    assert metrics.value("band_departures", "job", "kl") == 0.0
    for step in range(40, 50):
        log(step, kl=9.0)
    assert metrics.value("band_departures", "job", "kl") == 1.0
    log(50, kl=math.nan)
    assert shown("kl")[0] is None
    log(51, loss=1.0, grad_norm=1.0, **{f"name_{number}": 1.0 for number in range(30)})
    log(52, **{f"more_{number}": 1.0 for number in range(30)})
    assert shown("loss")[0] is None, "the names of measured scalars are not logged ones"
    assert len(run.bands) == MAX_LOGGED


def test_a_loss_above_its_band_is_counted_and_a_repeated_or_falling_one_is_not(metrics: Metrics) -> None:
    run, sink = watched(), MetricsSink(metrics)
    sink(0.0, events.RunChanged(run))

    def departures(*losses: float | None) -> float | None:
        for loss in losses:
            departures.step += 1  # type: ignore[attr-defined]
            reading = run.read_loss(TrainingStep(step=departures.step, loss=loss))  # type: ignore[attr-defined]
            sink(0.0, events.Assessed(run, alarm(run), None, reading))
        return metrics.value("band_departures", "job", "loss")

    departures.step = 0  # type: ignore[attr-defined]
    assert departures(*(3.0 + 0.1 * (step % 5) for step in range(40)), None) == 0.0
    assert metrics.value("band_low", "job", "loss") is None
    assert departures(9.0, 9.0, 9.0, 9.0) == 0.0, "one logged loss, seen in several snapshots"
    assert departures(3.0, 1.0, 0.9, 0.8) == 0.0
    assert departures(9.0, 9.5, 12.0) == 1.0


def test_the_history_commits_soon_after_the_first_event(tmp_path: Path) -> None:
    now = [10.0]
    with_clock: dict[str, Any] = {"clock": lambda: now[0], "wall": lambda: 1e9 + now[0]}
    history, run = HistoryWriter.open(tmp_path / "history.sqlite3", **with_clock), watched()
    sink = HistorySink(history, lambda: now[0])
    sink(1e9, events.RankJoined(run, run.hello, new=True))
    now[0] += COMMIT_SECONDS / 2
    sink(1e9, events.HeartbeatReceived(run, factories.heartbeat(5), {}, row_due=True, applied_changed=False))
    assert sink.commit_at == 10.0 + COMMIT_SECONDS

    def recorded() -> int:
        with HistoryReader.open(tmp_path / "history.sqlite3") as reader:
            return len(list(reader.heartbeats("job")))

    sink.upkeep(now[0], [])
    assert recorded() == 0
    sink.upkeep(sink.commit_at, [])
    assert recorded() == 1
    history.close()


class Calls:
    """A history that notes the names, arguments and options of its calls."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.made.append((name, args, options))


@pytest.mark.parametrize(("new", "names"), [(True, ["abandon_pending", "record_hello"]), (False, ["record_hello"])])
def test_the_hello_of_each_rank_is_recorded_and_a_new_launch_abandons_old_commands(new: bool, names: list[str]) -> None:
    history: Any = Calls()
    run = watched()
    HistorySink(history, lambda: 0.0)(7.0, events.RankJoined(run, run.hello, new=new))
    assert [name for name, _, _ in history.made] == names
    assert history.made[-1][1] == (7.0, run.hello)


@pytest.mark.parametrize("profile", [None, object()])
def test_a_snapshot_without_a_profile_is_recorded_as_not_finite(profile: Any) -> None:
    history: Any = Calls()
    run = watched()
    HistorySink(history, lambda: 0.0)(7.0, events.Assessed(run, replace(alarm(run), profile=profile)))
    options = {name: options for name, _, options in history.made}
    assert options["record_observation"]["non_finite"] is (profile is None)


def test_upkeep_commits_once_and_tends_the_history_each_time() -> None:
    history: Any = Calls()
    run = watched()
    sink = HistorySink(history, lambda: 10.0)
    sink(7.0, events.RankJoined(run, run.hello, new=False))
    history.made.clear()
    for now in (10.4, 10.5, 10.6):
        sink.upkeep(now, ["job"])
    tend = ("upkeep", (["job"],), {})
    assert history.made == [tend, ("commit", (), {}), tend, tend]


@pytest.mark.parametrize(("state", "reason"), [(RunState.ENDED, "finished"), (RunState.VANISHED, None)])
def test_only_an_end_has_a_reason_in_the_history(state: RunState, reason: str | None, tmp_path: Path) -> None:
    history, run = HistoryWriter.open(tmp_path / "history.sqlite3"), watched()
    sink = HistorySink(history, lambda: 0.0)
    sink(1.0, events.RankJoined(run, run.hello, new=True))
    run.state = state
    sink(2.0, events.RunClosed(run, "finished"))
    history.close()
    with HistoryReader.open(tmp_path / "history.sqlite3") as reader:
        (launch,) = reader.incarnations("job")
        found = reader.run("job")
    assert found is not None
    assert (found.state, launch.end_reason) == (state, reason)


def test_the_page_shows_a_decision_once_and_its_outcome() -> None:
    live_state, run = LiveState(), watched()
    assessment = alarm(run)
    for event in (events.RunChanged(run), events.Assessed(run, assessment), events.Decided(run, assessment)):
        live_state(0.0, event)
    command = next(each for each in assessment.commands if each.kind == "set_lr_scale")
    live_state(0.0, events.CommandUnanswered(run, command))
    view = live_state.view("job")
    assert view is not None
    ((decision,), (point,)) = view.decisions, view.points
    assert (decision.step, point.risk) == (3, 1.0)
    assert [each.outcome for each in decision.commands if each.command == command] == ["unanswered"]
    run.state = RunState.VANISHED
    live_state(0.0, events.RunClosed(run, ""))
    view = live_state.view("job")
    assert view is not None
    assert view.state == "vanished"


def test_decisions_and_first_acks_are_logged_and_annotated(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[float, tuple[str, ...], str]] = []
    run = watched()
    sink, assessment = LogSink(lambda *each: told.append(each)), alarm(run)
    command: Command = factories.command(1)
    with caplog.at_level(logging.INFO):
        sink(1.0, events.Assessed(run, assessment))
        sink(2.0, events.Decided(run, assessment))
        for at, first in ((3.0, True), (4.0, False)):
            answered = Answered(command.kind, first=first, counts=first)
            sink(at, events.CommandAcked(run, factories.ack(1, detail="by <rank 0>"), answered))
        sink(5.0, events.CommandUnanswered(run, command, replaced=True))
        sink(6.0, events.CommandUnanswered(run, command))
    reason = "risk 1.00: learning rate x 0.25; the residual stream is not finite"
    texts = [text for _, _, text in told]
    assert texts[0].startswith("job step 3: set_cadence, set_lr_scale: ")
    assert reason in texts[0]
    assert texts[1:] == [
        "job step 12: set_lr_scale applied ('by <rank 0>')",
        "job: set_lr_scale was not answered",
    ]
    assert [(at, tags) for at, tags, _ in told] == [
        (2.0, ("job", "acting", "set_cadence", "set_lr_scale")),
        (3.0, ("job", "set_lr_scale", "applied")),
        (6.0, ("job", "set_lr_scale", "unanswered")),
    ]
    assert [record.getMessage() for record in caplog.records][1] == f"run {texts[1]}"
