"""Notifications from the events of real controllers, and from a real monitor to a real webhook."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon.config import Config, MonitorConfig, PolicyConfig, from_mapping
from koopmon.history.schema import RunState
from koopmon.monitor import events
from koopmon.monitor.notify_sink import MEANS_ACTION, MEANS_ALARM, MEANS_RETURN, NotifySink
from koopmon.monitor.pending_commands import Answered
from koopmon.monitor.registry import RunRegistry
from koopmon.monitor.run import Run
from koopmon.monitor.run_controller import Assessment, RunController
from koopmon.notify.message import Notification
from koopmon.risk.causes import CAUSES
from koopmon.risk.online_detector import OnlineRisk
from koopmon.spectral import profile_states
from koopmon.wire.messages import Ack, Applied, TrainingStep
from tests import factories
from tests.notify.servers import WebhookServer

pytestmark = pytest.mark.usefixtures("one_snapshot_is_enough")

PAGES = "https://koopmon.example.org/"


def watched(config: Config | None = None, **hello: Any) -> Run:
    said = factories.hello(**hello)
    controller = RunController(config or Config(), said, said.applied)
    return RunRegistry(MonitorConfig()).admit(0.0, said, b"peer", lambda _: (controller, None)).run


def assess(run: Run, step: int, loss: float = 2.0) -> Assessment:
    """Assess a snapshot with states that are not finite: the policy backs off."""
    return run.controller.assess(float(step), TrainingStep(step=step, loss=loss), None, step=step)


def told(*happened: events.Event) -> list[Notification]:
    found: list[Notification] = []
    sink = NotifySink(found.append, PAGES)
    for at, event in enumerate(happened):
        sink(float(at), event)
    return found


def test_an_alarm_and_its_action_are_one_notification() -> None:
    run = watched()
    first = assess(run, 3)
    (alarm,) = told(
        events.RankJoined(run, run.hello, new=True), events.Assessed(run, first), events.Decided(run, first)
    )
    assert alarm == Notification(
        events=("alarm", "action"),
        run="job",
        at=1.0,
        step=3,
        risk=1.0,
        happened="The risk of divergence is 1.00 (threshold 0.40): the residual stream is not finite.",
        means=MEANS_ALARM,
        did=f"koopmon acts: risk 1.00: learning rate x 0.25. {MEANS_ACTION['set_lr_scale']}",
        page="https://koopmon.example.org/runs/job",
    )


def test_an_alarm_names_its_cause_and_the_advice() -> None:
    run = watched()
    training = TrainingStep(step=3, loss=2.0, log_partition=500.0)
    named = run.controller.assess(3.0, training, None, step=3, attention_logits=(None, 2000.0, 1500.0))
    (alarm,) = told(events.RankJoined(run, run.hello, new=True), events.Assessed(run, named))
    cause = "attention logits of layer 1 reached 2,000; output logits drift: log-partition 500"
    assert f"{cause}; the residual stream is not finite" in alarm.happened
    assert cause not in alarm.did, "it has its own line"
    advice = " ".join(each.next for each in CAUSES if each.name in ("attention", "output"))
    assert alarm.means == f"{MEANS_ALARM} If the alarm returns: {advice}"
    assert named.decision is not None
    assert cause in named.decision.reason


def test_an_alarm_lasts_until_the_risk_is_below_the_release() -> None:
    run = watched(Config(policy=PolicyConfig(name="observe")))

    def at(risk: float) -> events.Event:
        assessment = Assessment(
            observation=factories.observation(1), profile=None, risk=OnlineRisk(value=risk, reason="jump")
        )
        return events.Assessed(run, assessment)

    risks = (0.1, 0.39, 0.4, 0.9, 0.3, 0.5, 0.19, 0.41, 0.2, 0.6)
    found = told(*map(at, risks))
    assert [each.risk for each in found] == [0.4, 0.41]
    assert {each.events for each in found} == {("alarm",)}
    renewed = told(at(0.9), events.RankJoined(run, run.hello, new=True), at(0.9), events.RunRemoved(run), at(0.9))
    assert len(renewed) == 3, "a new launch begins without an alarm"


@pytest.mark.parametrize(
    ("policy", "hello", "says"),
    [
        ({"name": "observe"}, {}, "koopmon only watches, because the policy is observe."),
        ({"dry_run": True}, {}, "koopmon sends no command, because of --dry-run. Otherwise it would act: risk 1.00"),
        ({}, {"acts": False}, "koopmon sends no command, because the run is watch-only. Otherwise it would act: "),
    ],
)
def test_nothing_is_said_to_be_done_that_is_not_sent(policy: dict[str, Any], hello: dict[str, Any], says: str) -> None:
    run = watched(from_mapping({"policy": policy}), **hello)
    (alarm,) = told(events.Assessed(run, assess(run, 3)))
    assert alarm.events[0] == "alarm"
    assert alarm.did.startswith(says)
    assert "koopmon acts" not in alarm.did


def test_a_second_action_in_an_alarm_is_an_action() -> None:
    run = watched()
    found = told(events.Assessed(run, assess(run, 3)), events.Assessed(run, assess(run, 30)))
    assert [each.events for each in found] == [("alarm", "action"), ("action",)]
    assert found[1].happened.startswith("koopmon acts: risk 1.00: learning rate x ")
    assert found[1].means == MEANS_ACTION["set_lr_scale"]
    assert found[1].did == ""


def test_the_return_to_the_users_settings_and_no_step_on_the_way() -> None:
    run = watched(from_mapping({"policy": {"name": "lr", "hold_steps": 2}}))
    found: list[Notification] = []
    sink = NotifySink(found.append)
    sink(0.0, events.Assessed(run, assess(run, 3)))
    states = torch.cumsum(torch.randn((5, 64, 8), generator=torch.Generator().manual_seed(0)), dim=0)
    profile, scales = profile_states(states, svd_rank=8), []
    for step in range(10, 200, 2):
        calm = run.controller.assess(float(step), TrainingStep(step=step, loss=2.0), profile, step=step)
        scales += [command.lr_scale for command in calm.commands if command.kind == "set_lr_scale"]
        sink(float(step), events.Assessed(run, calm))
    assert len(scales) > 2
    assert scales[-1] == 1.0
    assert [each.events for each in found[1:]] == [("return",)]
    assert found[1].means == MEANS_RETURN
    assert found[1].page == ""


def test_a_command_without_an_effect_is_told_and_an_applied_one_is_not() -> None:
    run, command = watched(), factories.command(1)

    def ack(outcome: Any, kind: Any = "set_lr_scale", first: bool = True) -> events.Event:
        answer: Ack = factories.ack(1, outcome=outcome, detail="by <rank 0>")
        return events.CommandAcked(run, answer, Answered(kind, first=first, counts=first))

    found = told(
        ack("applied"),
        ack("duplicate"),
        ack("failed", first=False),
        ack("refused", kind="set_cadence"),
        ack("refused"),
        ack("expired", kind="rewind"),
        events.CommandUnanswered(run, command, replaced=True),
        events.CommandUnanswered(run, command),
    )
    assert [each.happened for each in found] == [
        "The command set_lr_scale was not applied: refused (by <rank 0>).",
        "The command rewind was not applied: expired (by <rank 0>).",
        "The command set_lr_scale was not answered.",
    ]
    assert {each.events for each in found} == {("action",)}


def test_an_end_and_a_loss() -> None:
    run = watched(step=7, applied=Applied(lr_scale=0.5))
    run.state = RunState.ENDED
    (end,) = told(events.RunClosed(run, "finished"))
    run.state = RunState.VANISHED
    (lost,) = told(events.RunClosed(run, ""))
    assert (end.events, end.happened, end.step) == (("end",), "The training ended: finished.", 7)
    assert (lost.events, lost.happened) == (("lost",), "No message of the run arrives any more.")
    assert end.did == lost.did == "A learning-rate scale of 0.5 was in force."
    run.applied, run.state = Applied(max_rate=0.00781, rate_shares={1: 0.5}), RunState.ENDED
    (end,) = told(events.RunClosed(run, "goodbye"))
    force = "A cap of 0.00781 on the learning rate was in force. Parameter groups with a bound on their rate: 1."
    assert (end.happened, end.did) == ("The training ended.", force)


def test_the_link_fits_every_name() -> None:
    run = watched(run="a/b+c:1-2")
    run.state = RunState.ENDED
    assert told(events.RunClosed(run, "done"))[0].page == f"{PAGES}runs/a/b%2Bc%3A1-2"


@pytest.fixture
def webhook() -> Iterator[WebhookServer]:
    server = WebhookServer()
    yield server
    server.close()


def test_a_monitor_notifies_of_an_alarm_an_action_and_the_end(
    start_monitor: Callable[..., Any],
    connect: Callable[..., Any],
    webhook: WebhookServer,
    until: Callable[[Callable[[], Any]], Any],
    quiet_logs: pytest.LogCaptureFixture,
) -> None:
    """Follow a run to its end, beside a target that hangs and one that is gone."""
    hanging = WebhookServer()
    hanging.faults.extend(["hang"] * 9)
    targets = [{"url": hanging.url}, {"url": "http://127.0.0.1:9/SECRET"}, {"url": webhook.url, "format": "json"}]
    try:
        monitor = start_monitor(notify={"webhooks": targets, "timeout_seconds": 60.0})
        agent = connect(monitor.addresses.endpoint)
        agent.hello()
        agent.snapshot(1)
        before = time.monotonic()
        agent.snapshot(3, torch.full((4, 96, 12), math.nan).bfloat16())
        command = agent.expect_command("set_lr_scale")
        until(lambda: webhook.requests)
        print(f"the alarm arrived {webhook.requests[0].at - before:.2f} s after its snapshot was sent")
        agent.acknowledge(command, "refused", Applied(), step=4)
        until(lambda: len(webhook.requests) == 2)
        agent.goodbye()
        until(lambda: len(webhook.requests) == 3)
        until(lambda: monitor.sample('notifications_total{channel="webhook",outcome="sent"}') == 3)
    finally:
        hanging.close()
    alarm, refused, end = (request.body for request in webhook.requests)
    assert alarm["events"] == ["alarm", "action"]
    assert alarm["page"] == f"http://{monitor.addresses.http}/runs/job"
    assert (refused["event"], end["event"]) == ("action", "end")
    assert end["happened"] == "The training ended: finished."
    assert "SECRET" not in quiet_logs.text
    assert "Traceback" not in quiet_logs.text


def test_the_pages_of_the_configuration_are_linked(
    start_monitor: Callable[..., Any],
    connect: Callable[..., Any],
    webhook: WebhookServer,
    until: Callable[[Callable[[], Any]], Any],
    tmp_path: Path,
) -> None:
    monitor = start_monitor(notify={"url": PAGES.rstrip("/"), "webhooks": [{"url": webhook.url, "events": ["end"]}]})
    agent = connect(monitor.addresses.endpoint)
    agent.hello()
    agent.snapshot(3, torch.full((4, 96, 12), math.nan).bfloat16())
    agent.expect_command("set_lr_scale")
    agent.goodbye()
    until(lambda: webhook.requests)
    assert webhook.texts == [
        f"*koopmon end: job*\nStep 9: The training ended: finished.\n{PAGES}runs/job",
    ]


@pytest.mark.process
@pytest.mark.parametrize("goodbye", [True, False])
def test_a_job_that_is_killed_under_koopmon_run_is_lost(
    connect: Callable[..., Any], webhook: WebhookServer, tmp_path: Path, goodbye: bool
) -> None:
    """The job prints its endpoint and ends with its standard input. Its monitor ends with it."""
    (tmp_path / "k.toml").write_text(f'[[notify.webhooks]]\nurl = "{webhook.url}"\n')
    body = "import os, sys; print(os.environ['KOOPMON_ENDPOINT'], *os.environ, flush=True); sys.stdin.read()"
    words = [sys.executable, "-m", "koopmon", "run", "--run", "short", "--config", "k.toml"]
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "KOOPMON_NOTIFY_PASSWORD": "x"}
    with subprocess.Popen(
        [*words, "--", sys.executable, "-S", "-c", body],
        env=environ, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as job:  # fmt: skip
        endpoint, *names = job.stdout.readline().decode().split()
        assert "KOOPMON_NOTIFY_PASSWORD" not in names, "a secret of the monitor"
        agent = connect(endpoint, run="short")
        agent.hello()
        if goodbye:
            agent.goodbye()
        agent.close()
        job.stdin.close()
        assert job.wait(60) == 0
    event = "end" if goodbye else "lost"
    (text,) = webhook.texts
    assert text.startswith(f"*koopmon {event}: short*\n")
