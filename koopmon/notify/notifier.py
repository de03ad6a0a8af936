"""Sends notifications to all targets, each from a thread and a bounded queue of its own."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from koopmon.errors import one_line
from koopmon.notify.message import Notification
from koopmon.notify.rate_limit import Key, RateLimit
from koopmon.notify.target import NotAcceptedError, NotifyTarget

logger = logging.getLogger(__name__)

Notify = Callable[[Notification], None]
"""Takes a notification; returns at once and never raises."""
Count = Callable[[str, str], None]
"""Counts one notification by its channel and its outcome: `sent`, `failed`, `dropped` or `held_back`."""

RETRY_SECONDS = (1.0, 5.0, 25.0)
"""Pauses before the second and later attempts. Chosen by hand: a restart of a receiver takes less."""
CLOSE_SECONDS = 5.0
"""Time limit in seconds for sending the queues at the end."""


def no_notifications(notification: Notification) -> None:
    """Discard the notification; used when no target is configured."""


def reason_of(error: Exception) -> str:
    """Return the reason of a failed delivery in one line without a secret."""
    return one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)


def send_test(target: NotifyTarget) -> str:
    """Send one test notification; return the reason of a failure, empty after a success."""
    happened = "This is a test of `koopmon monitor --test-notify`. No run is concerned."
    try:
        target.send(Notification(events=target.events[:1], run="test", at=time.time(), happened=happened))
    except Exception as error:
        return reason_of(error)
    return ""


class Notifier:
    """Queues of all targets. A slow or failing target delays neither the caller nor other targets."""

    def __init__(
        self,
        targets: Sequence[NotifyTarget],
        count: Count,
        *,
        max_per_hour: int,
        queue_length: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queues = [_TargetQueue(each, count, RateLimit(max_per_hour), queue_length, clock) for each in targets]

    def notify(self, notification: Notification) -> None:
        """Queue a notification for the targets that want it; see `Notify`."""
        for queue in self._queues:
            queue.add(notification)

    def close(self) -> None:
        """Send the queues for at most CLOSE_SECONDS, then stop the threads."""
        for queue in self._queues:
            queue.end()
        until = time.monotonic() + CLOSE_SECONDS
        for queue in self._queues:
            queue.join(until)


class _TargetQueue:
    """Thread and queue of one target, which sends the oldest notification first."""

    def __init__(
        self, target: NotifyTarget, count: Count, limit: RateLimit, length: int, clock: Callable[[], float]
    ) -> None:
        self._target = target
        self._count: Callable[[str], None] = partial(count, target.channel)
        self._limit = limit
        self._clock = clock
        self._queue: deque[Notification] = deque(maxlen=length)
        self._changed = threading.Condition()
        self._closing = False
        self._sending = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="koopmon-notify", daemon=True)
        self._thread.start()

    def add(self, notification: Notification) -> None:
        if not set(self._target.events).intersection(notification.events):
            return
        event = notification.events[0]
        with self._changed:
            now = self._clock()
            self._summarise(now)
            left = self._limit.admit(now, (notification.run, event))
            if left == 1:
                note = f"Further {event} notifications of this run are held back for up to an hour, then summarised."
                notification = replace(notification, note=note)
            if left > 0:
                self._put(notification)
        if left <= 0:
            self._count("held_back")

    def _summarise(self, now: float) -> None:
        for key, held_back in self._limit.ended(now):
            self._put(_summary(key, held_back))

    def _put(self, notification: Notification) -> None:
        full = len(self._queue) == self._queue.maxlen
        self._queue.append(notification)
        self._changed.notify()
        if full:
            self._count("dropped")

    def end(self) -> None:
        """Ask the thread to send the queue, without further attempts, and to end."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, until: float) -> None:
        """Wait for the thread until the time `until` of the monotonic clock."""
        self._thread.join(max(0.0, until - time.monotonic()))
        with self._changed:
            lost = len(self._queue) + self._sending
        if lost:
            logger.warning("%s: %d notifications were not sent before the end", self._target.label, lost)

    def _run(self) -> None:
        while (notification := self._next()) is not None:
            outcome = self._deliver(notification)
            with self._changed:
                self._sending = False
            self._count(outcome)

    def _next(self) -> Notification | None:
        """Wait for a notification or a summary that is due, and return it; None at the end."""
        with self._changed:
            while True:
                now = math.inf if self._closing else self._clock()
                self._summarise(now)
                if self._queue:
                    self._sending = True
                    return self._queue.popleft()
                if self._closing:
                    return None
                due = self._limit.next_end()
                self._changed.wait(None if due is None else max(0.0, due - now))

    def _deliver(self, notification: Notification) -> str:
        """Return the outcome after a few attempts."""
        why = ""
        for pause in (0.0, *RETRY_SECONDS):
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, timeout=pause) and pause:
                    break
            try:
                self._target.send(notification)
            except NotAcceptedError as error:
                why = reason_of(error)
                break
            except Exception as error:  # a library for TLS, HTTP or mail may raise any kind
                why = reason_of(error)
            else:
                self._report()
                return "sent"
        self._report(why)
        return "failed"

    def _report(self, why: str = "") -> None:
        """Log the first of several failures, and the first success after them, with an empty `why`."""
        label = self._target.label
        if why and not self._failing:
            words = "further failures are only counted, in koopmon_notifications_total"
            logger.warning("%s: a notification was not sent: %s; %s", label, why, words)
        elif self._failing and not why:
            logger.warning("%s: notifications are sent again", label)
        self._failing = bool(why)


def _summary(key: Key, held_back: int) -> Notification:
    run, event = key
    happened = f"{held_back} more {event} notifications of this run were held back within one hour."
    return Notification(events=(event,), run=run, at=time.time(), happened=happened)
