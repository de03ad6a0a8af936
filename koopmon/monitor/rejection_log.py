"""Counts every rejected message, and logs each reason at most once a minute."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from koopmon.telemetry.metrics import REJECTIONS, Metrics

logger = logging.getLogger(__name__)

LOG_SECONDS = 60.0


class RejectionLog:
    """Counts rejected messages by reason; logs each reason at most once a minute. Thread-safe."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        self._logged_at: dict[str, float] = {}
        self._silent: dict[str, int] = {}

    def note(self, reason: str, detail: str, *, cause: Exception | None = None, count: int = 1) -> None:
        """Count messages under `reason`, one of REJECTIONS; `detail` and `cause`, with its traceback, are logged."""
        if reason not in REJECTIONS:
            detail, reason = f"{reason}: {detail}", "garbage"
        self._metrics.add("messages_rejected", reason, amount=count)
        now = self._clock()
        with self._lock:
            logged_at = self._logged_at.get(reason)
            if logged_at is not None and now - logged_at < LOG_SECONDS:
                self._silent[reason] = self._silent.get(reason, 0) + count
                return
            self._logged_at[reason] = now
            silent = self._silent.pop(reason, 0)
        more = f" ({silent} more since the last such line)" if silent else ""
        logger.warning("message rejected (%s): %s%s", reason, detail, more, exc_info=cause)
