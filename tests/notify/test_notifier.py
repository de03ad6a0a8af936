"""Queues of the targets: order, retries, limits, isolation, and an end that never waits long."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from koopmon.config import NOTIFY_EVENTS, NotifyEvent
from koopmon.notify import notifier
from koopmon.notify.message import Notification, slack_body
from koopmon.notify.notifier import Notifier, send_test
from koopmon.notify.rate_limit import WINDOW_SECONDS
from koopmon.notify.target import NotAcceptedError
from koopmon.notify.webhook import Webhook
from tests.notify.conftest import Until, notification
from tests.notify.servers import WebhookServer


@dataclass
class Recorder:
    """Target that records; it raises `errors` first, and waits while `gate` is closed."""

    channel: str = "webhook"
    label: str = "recorder"
    events: tuple[NotifyEvent, ...] = NOTIFY_EVENTS
    errors: list[Exception] = field(default_factory=list)
    sent: list[Notification] = field(default_factory=list)
    attempts: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def send(self, told: Notification) -> None:
        self.attempts += 1
        self.gate.wait(30)
        if self.errors:
            raise self.errors.pop(0)
        self.sent.append(told)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


Start = Callable[..., Notifier]


@pytest.fixture
def counted() -> Counter[tuple[str, str]]:
    return Counter()


@pytest.fixture
def start(counted: Counter[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(notifier, "RETRY_SECONDS", (0.01, 0.02, 0.03))
    lock, started = threading.Lock(), []

    def count(channel: str, outcome: str) -> None:
        with lock:
            counted[channel, outcome] += 1

    def begin(*targets: Any, max_per_hour: int = 100, queue_length: int = 100, **more: Any) -> Notifier:
        started.append(Notifier(targets, count, max_per_hour=max_per_hour, queue_length=queue_length, **more))
        return started[-1]

    yield begin
    for each in started:
        each.close()


def test_each_target_receives_its_events_in_order(start: Start) -> None:
    everything, losses = Recorder(), Recorder(events=("lost", "action"))
    told = start(everything, losses)
    for number, events in enumerate([("alarm", "action"), ("end",), ("lost",), ("return",)]):
        told.notify(notification(events=events, step=number))
    told.close()
    assert [each.step for each in everything.sent] == [0, 1, 2, 3]
    assert [each.step for each in losses.sent] == [0, 2]


def test_a_target_that_recovers_gets_the_notification(
    start: Start, counted: Counter[tuple[str, str]], until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    target = Recorder(errors=[ConnectionError("down"), TimeoutError("slow"), RuntimeError("odd")])
    told = start(target)
    told.notify(notification())
    until(lambda: target.sent)
    told.close()
    assert target.attempts == 4
    assert counted == {("webhook", "sent"): 1}
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("errors", "attempts"),
    [([ConnectionError("down")] * 4, 4), ([NotAcceptedError("it answers 404")], 1)],
    ids=["a few attempts", "a retry would not help"],
)
def test_a_failing_target_is_one_line_and_a_count(
    start: Start,
    counted: Counter[tuple[str, str]],
    until: Until,
    caplog: pytest.LogCaptureFixture,
    errors: list[Exception],
    attempts: int,
) -> None:
    target = Recorder(errors=errors * 3)
    told = start(target)
    for number in range(3):
        told.notify(notification(step=number))
    until(lambda: counted["webhook", "failed"] == 3)
    assert target.attempts == 3 * attempts
    (line,) = caplog.messages
    assert line.startswith(f"recorder: a notification was not sent: {errors[0]}; further failures are only counted")
    told.notify(notification(step=3))
    until(lambda: target.sent)
    until(lambda: caplog.messages[1:] == ["recorder: notifications are sent again"])
    assert counted == {("webhook", "failed"): 3, ("webhook", "sent"): 1}


def test_a_slow_target_delays_nobody_and_keeps_the_newest(
    start: Start, counted: Counter[tuple[str, str]], until: Until
) -> None:
    slow, fast = Recorder(channel="mail"), Recorder()
    slow.gate.clear()
    told = start(slow, fast, queue_length=4, max_per_hour=1000)
    told.notify(notification(step=0))
    until(lambda: slow.attempts)
    for number in range(1, 100):
        told.notify(notification(step=number))
        until(lambda number=number: len(fast.sent) == number + 1)
    assert counted["mail", "dropped"] == 95
    slow.gate.set()
    until(lambda: len(slow.sent) == 5)
    assert [each.step for each in slow.sent] == [0, 96, 97, 98, 99]
    until(lambda: counted["mail", "sent"] == 5)
    assert counted["webhook", "sent"] == 100


def test_a_run_that_flaps_sends_a_few_and_one_summary(
    start: Start, counted: Counter[tuple[str, str]], until: Until
) -> None:
    target, clock = Recorder(), Clock()
    told = start(target, max_per_hour=3, clock=clock)
    for number in range(50):
        told.notify(notification(step=number))
    told.notify(notification("other"))
    told.notify(notification(events=("lost",)))
    until(lambda: len(target.sent) == 5)
    assert [(each.run, each.step) for each in target.sent[:3]] == [("job", 0), ("job", 1), ("job", 2)]
    assert [each.note[:28] for each in target.sent[:3]] == ["", "", "Further alarm notifications "]
    assert counted["webhook", "held_back"] == 47
    clock.now += WINDOW_SECONDS
    told.notify(notification(step=99))
    until(lambda: len(target.sent) == 7)
    summary, later = target.sent[5:]
    assert summary.happened == "47 more alarm notifications of this run were held back within one hour."
    assert later.step == 99


def test_the_summary_of_an_hour_needs_no_further_event(
    start: Start, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.notify.rate_limit.WINDOW_SECONDS", 0.2)
    target = Recorder()
    told = start(target, max_per_hour=1)
    for number in range(3):
        told.notify(notification(step=number))
    until(lambda: len(target.sent) == 2)
    assert target.sent[1].happened == "2 more alarm notifications of this run were held back within one hour."
    assert target.sent[1].events == ("alarm",)


def test_the_end_sends_the_queue_and_the_summaries(start: Start) -> None:
    target = Recorder()
    target.gate.clear()
    told = start(target, max_per_hour=2)
    for number in range(5):
        told.notify(notification(step=number))
    threading.Timer(0.05, target.gate.set).start()
    told.close()
    assert [each.step for each in target.sent] == [0, 1, None]
    assert target.sent[-1].happened.startswith("3 more alarm")


def test_the_end_does_not_wait_for_a_target_that_hangs(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    monkeypatch.setattr(notifier, "CLOSE_SECONDS", 0.2)
    hanging, good = [Recorder(label=f"hanging {number}") for number in range(5)], Recorder()
    for each in hanging:
        each.gate.clear()
    told = start(*hanging, good)
    for number in range(3):
        told.notify(notification(step=number))
    until(lambda: all(each.attempts for each in hanging))
    told.close()
    assert not any(each.sent for each in hanging), "the end waited until they sent"
    assert len(good.sent) == 3
    assert sorted(caplog.messages) == [f"hanging {n}: 3 notifications were not sent before the end" for n in range(5)]
    for each in hanging:
        each.gate.set()


def test_no_pause_between_attempts_delays_the_end(
    start: Start, monkeypatch: pytest.MonkeyPatch, until: Until, counted: Counter[tuple[str, str]]
) -> None:
    monkeypatch.setattr(notifier, "RETRY_SECONDS", (60.0,))
    target = Recorder(errors=[ConnectionError("down")] * 9)
    told = start(target)
    for number in range(3):
        told.notify(notification(step=number))
    until(lambda: target.attempts == 1)
    told.close()
    assert (target.attempts, counted) == (3, {("webhook", "failed"): 3})


def test_a_real_receiver_that_is_away_at_first(start: Start, until: Until, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = WebhookServer()
    try:
        server.faults.extend([503, "close"])
        told = start(Webhook("hook", NOTIFY_EVENTS, server.url, slack_body))
        told.notify(notification())
        until(lambda: len(server.requests) == 3)
        told.close()
        server.faults.append(404)
        told = start(Webhook("hook", NOTIFY_EVENTS, server.url, slack_body))
        told.notify(notification())
        until(lambda: caplog.messages)
    finally:
        server.close()
    assert "it answers 404 Not Found" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_test_notification_names_its_purpose() -> None:
    target = Recorder(events=("lost",))
    assert send_test(target) == ""
    (told,) = target.sent
    assert (told.run, told.events) == ("test", ("lost",))
    assert "--test-notify" in told.happened
    assert send_test(Recorder(errors=[NotAcceptedError("it answers 403")])) == "it answers 403"
