"""Posts every decision and its outcome as an annotation to Grafana, from a thread that never blocks the monitor.

It does not use grafana_client, which is slow to import and replaces urllib3.
"""

from __future__ import annotations

import html
import http.client
import json
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from koopmon.errors import one_line
from koopmon.grafana.access import GrafanaAccess
from koopmon.http_client import exchange

logger = logging.getLogger(__name__)

Annotate: TypeAlias = Callable[[float, tuple[str, ...], str], None]
"""Callback with the time (Unix seconds), tags and text of an annotation; returns at once and never raises."""

TAG = "koopmon"
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
CLOSE_SECONDS = 2.0
"""Time limit in seconds for posting the queue at the end."""
MAX_TEXT = 2000
MAX_ANSWER_BYTES = 1 << 16


def no_annotations(at: float, tags: tuple[str, ...], text: str) -> None:
    """Discard the annotation; used when no Grafana is configured."""


class RefusedError(Exception):
    """Grafana rejects this annotation permanently."""


class Annotations:
    """Posts the annotations of `add`, oldest first.

    While Grafana is unreachable, the newest `queue_length` annotations stay queued. Annotations lost to a full queue or
    a rejection are counted and logged once.
    """

    def __init__(self, access: GrafanaAccess, queue_length: int) -> None:
        if access.in_clear:
            logger.warning("grafana %s has no TLS: others on the network can read the token", access.url)
        self._access = access
        self._queue: deque[bytes] = deque(maxlen=queue_length)
        self._changed = threading.Condition()
        self._closing = False
        self._lost = 0
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="koopmon-annotations", daemon=True)
        self._thread.start()

    def add(self, at: float, tags: tuple[str, ...], text: str) -> None:
        """Queue one annotation, see `Annotate`. The text is escaped, because Grafana renders a peer's text as HTML."""
        words = html.escape(one_line(text, MAX_TEXT), quote=False)
        body = {"time": round(at * 1000), "tags": [TAG, *tags], "text": words}
        with self._changed:
            if len(self._queue) == self._queue.maxlen:
                self._lost += 1
            self._queue.append(json.dumps(body).encode())
            self._changed.notify()

    def close(self) -> None:
        """Post the queue for at most CLOSE_SECONDS, then stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        with self._changed:
            lost = self._lost + len(self._queue)
        if lost:
            logger.warning("grafana: %d annotations were not posted", lost)

    def _run(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while (body := self._next()) is not None:
            try:
                self._post(body)
            except (OSError, http.client.HTTPException) as error:
                self._report(getattr(error, "strerror", None) or str(error) or type(error).__name__)
                if self._closing:
                    return
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, timeout=pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            except Exception as error:  # a rejection or an unexpected error would recur on a retry
                self._taken(body, lost=True)
                self._report(str(error) or type(error).__name__)
            else:
                pause = FIRST_PAUSE_SECONDS
                self._taken(body, lost=False)
                self._report()

    def _next(self) -> bytes | None:
        """Wait for the oldest queued annotation and return it; None when the queue is empty and `close` was called."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            return self._queue[0] if self._queue else None

    def _taken(self, body: bytes, *, lost: bool) -> None:
        """Remove `body` from the queue; if a newer annotation displaced it, correct the count of losses."""
        with self._changed:
            if self._queue and self._queue[0] is body:
                self._queue.popleft()
                self._lost += lost
            elif not lost:
                self._lost -= 1

    def _post(self, body: bytes) -> None:
        # Decisions are rare, so Grafana would have closed an idle connection before the next one.
        headers = {"Authorization": f"Bearer {self._access.token}", "Content-Type": "application/json"}
        url, seconds = f"{self._access.url}api/annotations", self._access.timeout_seconds
        answer = exchange("POST", url, body=body, headers=headers, seconds=seconds, max_bytes=MAX_ANSWER_BYTES)
        if answer.status == 429 or answer.status >= 500:
            raise http.client.HTTPException(f"it answers {answer.status}")
        if answer.status != 200:
            raise RefusedError(f"it answers {answer.status}: {_said(answer.body)}")

    def _report(self, why: str = "") -> None:
        """Log the first of several failures, and the first success after them, with an empty `why`."""
        if why and not self._failing:
            logger.warning("grafana %s: annotations are not posted: %s", self._access.url, one_line(why, 200))
        elif self._failing and not why:
            with self._changed:
                lost, self._lost = self._lost, 0
            logger.warning("grafana: annotations are posted again; %d were lost", lost)
        self._failing = bool(why)


def _said(answer: bytes) -> str:
    try:
        message = json.loads(answer)["message"]
    except (ValueError, KeyError, TypeError):
        return "no reason given"
    return one_line(message, 160)
