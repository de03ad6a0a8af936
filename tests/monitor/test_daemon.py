"""The monitor over real sockets, with a scripted agent."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon import policy
from koopmon.config import Config
from koopmon.errors import EndpointError, StoreError
from koopmon.monitor.daemon import Monitor
from koopmon.monitor.service import Service
from koopmon.wire.codec import encode
from koopmon.wire.headers import MAGIC, PREFIX
from koopmon.wire.messages import (
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    KssSettings,
    Refused,
    TrainingStep,
    Welcome,
)

httpx = pytest.importorskip("httpx")

Start = Callable[..., Any]
Until = Callable[[Callable[[], Any]], Any]


def explode(agent: Any, step: int) -> None:
    """A snapshot that is not finite: the policy backs off at once."""
    agent.snapshot(step, torch.full((4, 96, 12), math.nan).bfloat16())


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_snapshots_become_metrics_and_history(
    start_monitor: Start, connect: Start, until: Until, tmp_path: Path, transport: str
) -> None:
    bind = "tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{tmp_path}/run/control"
    monitor = start_monitor(bind=bind)
    agent = connect(monitor.addresses.endpoint)
    welcome = agent.hello()
    assert welcome.data_endpoint == monitor.addresses.data_endpoint
    assert welcome.restore is None
    for number, step in enumerate((1, 3, 5), 1):
        agent.snapshot(step)
        until(lambda: monitor.sample("dmd_duration_seconds_count") == number)  # noqa: B023
    agent.heartbeat(7, overhead_ratio=0.01, taps_missing=2, dropped={"budget": 4}, applied=Applied(lr_scale=0.5))
    samples = monitor.samples()
    assert samples['snapshots_received_total{run="job"}'] == 3
    assert samples['step{run="job"}'] == 7
    assert samples['run_state{run="job",state="running"}'] == 1
    assert samples['lr_scale{run="job"}'] == 0.5
    assert samples['agent_overhead_ratio{run="job"}'] == 0.01
    assert samples['taps_missing_total{run="job"}'] == 2
    assert samples['agent_snapshots_dropped_total{reason="budget",run="job"}'] == 4
    assert 0 <= samples['risk{run="job"}'] <= 1
    assert samples['initial_near_unit_mass{run="job"}'] >= 0
    assert samples['informative{run="job"}'] == 1
    for layer in ("0", "1", "2"):
        assert samples[f'spectral_radius{{layer="{layer}",run="job"}}'] > 0
    assert 'spectral_radius{layer="3",run="job"}' not in samples
    assert all(math.isfinite(value) for value in samples.values())
    assert not any(value for name, value in samples.items() if name.startswith("messages_rejected"))
    agent.heartbeat(8, dropped={"budget": 5})
    assert monitor.sample('agent_snapshots_dropped_total{reason="budget",run="job"}') == 5, "agents report totals"
    monitor.stop()
    with monitor.history() as history:
        assert [row.step for row in history.profiles("job")] == [1, 3, 5]
        assert [row.step for row in history.observations("job")] == [1, 3, 5]
        assert [(row.training.learning_rate, row.training.loss) for row in history.observations("job")] == [
            (0.1, 2.0)
        ] * 3
        assert [row.step for row in history.heartbeats("job")] == [7], "heartbeats are thinned"


def test_a_danger_brings_a_command_that_is_on_disk_first(start_monitor: Start, connect: Start, until: Until) -> None:
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    agent.snapshot(1)
    explode(agent, 3)
    command = agent.expect_command("set_lr_scale")
    with monitor.history() as history:
        (decision,) = history.decisions("job")
    recorded = {row.command.id: row for row in decision.commands}
    assert recorded[command.id].command == command
    assert recorded[command.id].outcome == "pending"
    assert decision.reason
    again = agent.expect_command("set_lr_scale")
    assert again == command, "it is offered again until it is answered"
    held = Applied(lr_scale=command.lr_scale)
    agent.acknowledge(command, "applied", held, step=4)
    for again in ("duplicate", "failed", "applied"):
        agent.acknowledge(command, again, held, step=5)
    agent.heartbeat(6, applied=held)
    name = 'commands_settled_total{{kind="set_lr_scale",outcome="{}",run="job"}}'
    samples = until(lambda: (found := monitor.samples())['step{run="job"}'] == 6 and found)
    assert samples['commands_issued_total{kind="set_lr_scale",run="job"}'] == samples[name.format("applied")] == 1
    assert samples[name.format("duplicate")] == samples[name.format("failed")] == 0, "only the first answer counts"
    assert samples['lr_scale{run="job"}'] == command.lr_scale

    def outcome() -> str:
        with monitor.history() as history:
            (decision,) = history.decisions("job")
            return {row.command.id: row.outcome for row in decision.commands}[command.id]

    until(lambda: outcome() == "applied")


def test_states_that_an_agent_kept_for_not_being_finite_count_as_seen(
    start_monitor: Start, connect: Start, until: Until
) -> None:
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    agent.heartbeat(4, dropped={"not_finite": 1}, loss=math.nan)
    assert agent.expect_command("set_lr_scale").lr_scale < 1
    assert monitor.sample('risk{run="job"}') == 1
    assert monitor.sample('informative{run="job"}') == 0


def test_what_alerts_ask_of_is_counted(start_monitor: Start, connect: Start, until: Until) -> None:
    """High risks and effects of actions count once for each snapshot, so that none is lost between scrapes."""
    monitor = start_monitor(policy={"cooldown_steps": 2})
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    agent.snapshot(1)
    alarms, checks = 'risk_alarms_total{run="job"}', 'effect_checks_total{outcome="%s",run="job"}'
    until(lambda: monitor.sample("dmd_duration_seconds_count") == 1)
    assert monitor.samples()[alarms] == monitor.samples()[checks % "no_effect"] == 0
    explode(agent, 2)
    until(lambda: monitor.sample(alarms) == 1)
    assert monitor.sample(checks % "no_effect") == 0, "the action has had no time yet"
    agent.snapshot(3)
    explode(agent, 5)
    until(lambda: monitor.sample(alarms) == 2)
    assert monitor.sample(checks % "no_effect") == 1
    for step in (6, 8):
        agent.snapshot(step)
    until(lambda: monitor.sample(checks % "effect") == 1)
    assert monitor.sample(alarms) == 2


def test_dry_run_decides_and_sends_nothing(start_monitor: Start, connect: Start, until: Until) -> None:
    monitor = start_monitor(policy={"dry_run": True})
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    explode(agent, 1)
    until(lambda: monitor.sample('commands_settled_total{kind="set_lr_scale",outcome="dry_run",run="job"}') == 1)
    for step in range(2, 5):
        agent.heartbeat(step)
    assert not any(isinstance(message, Command) for message in agent.seen)
    explode(agent, 20)
    until(lambda: monitor.sample('risk_alarms_total{run="job"}') == 2)
    assert monitor.sample('effect_checks_total{outcome="no_effect",run="job"}') == 0, "nothing was done"
    with monitor.history() as history:
        decision, *_ = history.decisions("job")
    assert {row.outcome for row in decision.commands} == {"dry_run"}


def test_a_command_that_nobody_answers_expires(start_monitor: Start, connect: Start, until: Until) -> None:
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    explode(agent, 1)
    command = agent.expect_command("set_lr_scale")
    agent.heartbeat(command.expires_step + 1)
    until(lambda: monitor.sample('commands_settled_total{kind="set_lr_scale",outcome="unanswered",run="job"}') == 1)
    with monitor.history() as history:
        (decision,) = history.decisions("job")
    assert {row.command.id: row.outcome for row in decision.commands}[command.id] == "unanswered"


def test_garbage_on_both_channels_is_counted_and_logged_seldom(
    start_monitor: Start, connect: Start, until: Until, quiet_logs: pytest.LogCaptureFixture
) -> None:
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    rubbish = [[b"GET / HTTP/1.1\r\n"], [b""], [PREFIX + b"\xc1\xc1"], [b"\0" * 100]]
    for frames in rubbish:
        agent.send_frames(frames)
        agent.send_data(frames)
    agent.send_data([*rubbish[0], b"more", b"frames"])
    shard_without_frames = encode(
        Heartbeat(**agent.name, process_rank=0, training=TrainingStep(step=1), applied=Applied())
    )
    agent.send_data(shard_without_frames)
    agent.send_frames([PREFIX + b"\x81\xa4type\xa5hello"])
    until(lambda: monitor.sample('messages_rejected_total{reason="garbage"}') == 9)
    until(lambda: monitor.sample('messages_rejected_total{reason="direction"}') == 1)
    until(lambda: monitor.sample('messages_rejected_total{reason="schema"}') == 1)
    lines = [record.getMessage() for record in quiet_logs.records if "rejected" in record.getMessage()]
    assert len(lines) == 3
    agent.heartbeat(2)
    agent.snapshot(3)
    until(lambda: monitor.sample("dmd_duration_seconds_count") == 1)


def test_another_protocol_version_is_told(start_monitor: Start, connect: Start, until: Until) -> None:
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    frames = encode(Heartbeat(**agent.name, process_rank=0, training=TrainingStep(step=1), applied=Applied()))
    header = bytes(frames[0])
    agent.send_frames([MAGIC + bytes([99]) + header[len(PREFIX) :]])
    refused = agent.expect(Refused)
    assert "version 99" in refused.reason
    assert "upgrade" in refused.reason
    assert monitor.sample('messages_rejected_total{reason="version"}') == 1


def test_strangers_and_impostors_are_rejected(start_monitor: Start, connect: Start, until: Until) -> None:
    monitor = start_monitor()
    agent, impostor = connect(monitor.addresses.endpoint), connect(monitor.addresses.endpoint)
    impostor.send(Heartbeat(**impostor.name, process_rank=0, training=TrainingStep(step=1), applied=Applied()))
    until(lambda: monitor.sample('messages_rejected_total{reason="unknown_run"}') == 1)
    agent.hello()
    impostor.send(Goodbye(**impostor.name, process_rank=0, step=1))
    until(lambda: monitor.sample('messages_rejected_total{reason="identity"}') == 1)
    assert monitor.sample('run_state{run="job",state="running"}') == 1
    agent.snapshot(1)
    agent.snapshot(1)
    until(lambda: monitor.sample('messages_rejected_total{reason="late"}') == 1)
    agent.acknowledge(Command(**agent.name, id="f" * 8, kind="stop", reason="", expires_step=1), "applied", Applied())
    until(lambda: monitor.sample('messages_rejected_total{reason="unknown_command"}') == 1)


def test_several_runs_at_once_and_no_more_than_allowed(start_monitor: Start, connect: Start, until: Until) -> None:
    monitor = start_monitor(monitor={"max_runs": 2})
    agents = [connect(monitor.addresses.endpoint, run=run) for run in ("one", "two", "three")]
    assert [type(agent.hello()) for agent in agents] == [Welcome, Welcome, Refused]
    for step in (1, 2):
        for agent in agents[:2]:
            agent.snapshot(step)
    until(lambda: monitor.sample("dmd_duration_seconds_count") == 4)
    samples = monitor.samples()
    assert samples['snapshots_received_total{run="one"}'] == samples['snapshots_received_total{run="two"}'] == 2
    assert samples['messages_rejected_total{reason="refused"}'] == 1
    assert not any('run="three"' in name for name in samples)
    agents[0].goodbye()
    until(lambda: monitor.sample('run_state{run="one",state="ended"}') == 1)
    assert isinstance(agents[2].hello(), Welcome), "a run that is over gives its place"
    assert not any('run="one"' in name for name in monitor.samples())


def test_shards_of_several_ranks_make_one_snapshot(start_monitor: Start, connect: Start, until: Until) -> None:
    monitor = start_monitor(monitor={"assemble_timeout_seconds": 0.3})
    ranks = [connect(monitor.addresses.endpoint, rank=rank, num_senders=2) for rank in (0, 1)]
    for agent in ranks:
        agent.hello()
        agent.snapshot(1)
    until(lambda: monitor.sample('snapshots_received_total{run="job"}') == 1)
    ranks[1].snapshot(2)
    until(lambda: monitor.sample('snapshots_received_total{run="job"}') == 2)
    monitor.stop()
    with monitor.history() as history:
        rows = list(history.profiles("job"))
    assert [row.num_shards for row in rows] == [2, 1]
    assert [row.profile.num_samples for row in rows if row.profile] == [192, 96]


def test_series_of_a_run_that_ended_stay_and_then_go(start_monitor: Start, connect: Start, until: Until) -> None:
    monitor = start_monitor(monitor={"ended_series_seconds": 4.0})
    before = monitor.samples().keys()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    agent.snapshot(1)
    until(lambda: monitor.sample("dmd_duration_seconds_count") == 1)
    agent.goodbye()
    samples = until(lambda: (found := monitor.samples()).get('run_state{run="job",state="ended"}') == 1 and found)
    assert 'spectral_radius{layer="0",run="job"}' in samples
    until(lambda: monitor.samples().keys() == before)
    with monitor.history() as history:
        (incarnation,) = history.incarnations("job")
    assert incarnation.end_reason == "finished"
    assert incarnation.ended is not None


def test_a_run_that_vanishes_keeps_two_series_and_can_come_back(
    start_monitor: Start, connect: Start, until: Until
) -> None:
    monitor = start_monitor(monitor={"vanished_after_seconds": 3.0})
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    agent.snapshot(1)
    until(lambda: monitor.sample("dmd_duration_seconds_count") == 1)
    samples = until(lambda: (found := monitor.samples()).get('run_state{run="job",state="vanished"}') == 1 and found)
    left = {name.partition("{")[0] for name in samples if 'run="job"' in name}
    assert left == {"run_state", "last_snapshot_timestamp_seconds"}
    agent.heartbeat(5)
    samples = monitor.samples()
    assert samples['run_state{run="job",state="running"}'] == 1
    assert samples['snapshots_received_total{run="job"}'] == 0
    with monitor.history() as history:
        assert history.runs() == ["job"]


def test_a_restarted_job_gets_back_what_was_applied(start_monitor: Start, connect: Start, until: Until) -> None:
    monitor = start_monitor()
    held = Applied(lr_scale=0.25, kss=KssSettings(alpha=0.1, tau_u=2.0))
    first = connect(monitor.addresses.endpoint, incarnation="aaaaaaaa")
    first.hello()
    first.heartbeat(50, applied=held)
    second = connect(monitor.addresses.endpoint, incarnation="bbbbbbbb")
    assert second.hello().restore == held
    assert second.hello(num_layers=4).restore == held, "told until the rank is heard"
    second.heartbeat(1, applied=held)
    assert second.hello(applied=held, step=2).restore is None
    refused = first.hello()
    assert isinstance(refused, Refused)
    assert "KOOPMON_RUN" in refused.reason
    first.send(Heartbeat(**first.name, process_rank=0, training=TrainingStep(step=51), applied=held))
    until(lambda: monitor.sample('messages_rejected_total{reason="stale_incarnation"}') == 1)


def test_an_agent_that_kept_the_settings_itself_gets_no_older_ones(start_monitor: Start, connect: Start) -> None:
    monitor = start_monitor()
    first = connect(monitor.addresses.endpoint, incarnation="aaaaaaaa")
    first.hello()
    first.heartbeat(50, applied=Applied(lr_scale=0.5))
    second = connect(monitor.addresses.endpoint, incarnation="bbbbbbbb")
    assert second.hello(applied=Applied(lr_scale=0.25)).restore is None


def test_a_training_that_said_goodbye_hands_nothing_to_the_next(
    start_monitor: Start, connect: Start, until: Until
) -> None:
    monitor = start_monitor()
    held = Applied(lr_scale=0.25, max_rate=0.01, kss=KssSettings(alpha=0.1, tau_u=2.0))
    first = connect(monitor.addresses.endpoint, incarnation="aaaaaaaa")
    first.hello()
    first.heartbeat(50, applied=held)
    first.send(Goodbye(**first.name, process_rank=0, step=50, reason="finished"))
    until(lambda: monitor.sample('run_state{run="job",state="running"}') != 1)
    second = connect(monitor.addresses.endpoint, incarnation="bbbbbbbb")
    assert second.hello().restore is None
    second.heartbeat(30, applied=held)
    third = connect(monitor.addresses.endpoint, incarnation="cccccccc")
    assert third.hello().restore == held, "the second was killed"
    fourth = connect(monitor.addresses.endpoint, incarnation="dddddddd")
    assert fourth.hello().restore == held, "the third was killed before its first step"


def test_health_and_readiness(start_monitor: Start) -> None:
    monitor = start_monitor()
    for page in ("healthz", "readyz"):
        assert httpx.get(f"http://{monitor.addresses.http}/{page}", timeout=30.0).status_code == 200


@pytest.mark.parametrize("contested", ["endpoint", "ipc", "http", "store", "data"])
def test_two_monitors_do_not_share_anything(start_monitor: Start, tmp_path: Path, contested: str) -> None:
    ipc = f"ipc://{tmp_path}/run/control"
    first = start_monitor(bind=ipc if contested == "ipc" else "tcp://127.0.0.1:0")
    taken = {
        "endpoint": {"bind": first.addresses.endpoint},
        "ipc": {"bind": ipc},
        "http": {"http": first.addresses.http},
        "store": {"store_path": first.store},
        "data": {"data_bind": first.addresses.data_endpoint},
    }[contested]
    options = {"bind": "tcp://127.0.0.1:0", "http": "127.0.0.1:0", "store_path": tmp_path / "other.sqlite3", **taken}
    with pytest.raises((EndpointError, StoreError), match="in use") as caught:
        Monitor(Config(), **options).run()
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    assert httpx.get(f"http://{first.addresses.http}/readyz", timeout=30.0).status_code == 200


def test_a_policy_that_fails_ends_nothing(
    start_monitor: Start, connect: Start, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    with monkeypatch.context() as patch:
        patch.setattr(policy, "decide", fail)
        agent.snapshot(1)
        until(lambda: monitor.sample("engine_failures_total") == 1)
    explode(agent, 2)
    assert agent.expect_command("set_lr_scale")
    monitor.stop()
    with monitor.history() as history:
        assert [row.step for row in history.profiles("job")] == [1, 2]


def test_an_error_of_our_own_costs_one_message(
    start_monitor: Start,
    connect: Start,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
    quiet_logs: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    with monkeypatch.context() as patch:
        patch.setattr(Service, "_close", fail)
        agent.goodbye()
        until(lambda: monitor.sample('messages_rejected_total{reason="internal"}') == 1)
    assert "Traceback" in quiet_logs.text
    assert isinstance(agent.hello(), Welcome)


def test_heartbeats_are_answered(start_monitor: Start, connect: Start) -> None:
    agent = connect(start_monitor(monitor={"heartbeat_seconds": 0.25}).addresses.endpoint)
    assert agent.hello().heartbeat_seconds == 0.25
    agent.heartbeat(1)
    assert agent.seen[-1] == HeartbeatReply(**agent.name)
    assert agent.seen[-1].judgement is None, "nothing was judged yet"


def test_the_answer_to_a_heartbeat_tells_what_was_made_of_the_last_snapshot(
    start_monitor: Start, connect: Start, until: Until
) -> None:
    monitor = start_monitor()
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    agent.snapshot(1)
    until(lambda: monitor.sample('risk{run="job"}') is not None)
    agent.heartbeat(2)
    judgement = agent.seen[-1].judgement
    assert judgement.step == 1
    assert judgement.risk == monitor.sample('risk{run="job"}')
    assert judgement.forecast == monitor.sample('forecast{run="job"}')
    masses = [value for key, value in monitor.samples().items() if key.startswith("near_unit_mass{")]
    assert judgement.near_unit_mass == pytest.approx(sum(masses) / len(masses))
    assert (judgement.divergence_probability, judgement.decision, judgement.decision_step) == (None, "", None)
    agent.heartbeat(3, dropped={"not_finite": 1})
    until(lambda: monitor.sample('commands_issued_total{kind="set_lr_scale",run="job"}') == 1)
    agent.heartbeat(4)
    judgement = next(each.judgement for each in reversed(agent.seen) if isinstance(each, HeartbeatReply))
    assert judgement.risk == 1.0
    assert judgement.near_unit_mass is None
    assert judgement.decision
    assert judgement.decision_step == 3
