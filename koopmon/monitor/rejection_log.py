"""Counts every rejected message, and logs each reason at most once a minute."""

from __future__ import annotations

import logging
from collections.abc import Callable

from koopmon.logs import LogLimit
from koopmon.telemetry.metrics import REJECTIONS, Metrics

logger = logging.getLogger(__name__)


class RejectionLog:
    """Counts rejected messages by reason; logs each reason at most once a minute. Thread-safe."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._limit = LogLimit()

    def note(self, reason: str, detail: str, *, cause: Exception | None = None, count: int = 1) -> None:
        """Count messages under `reason`, one of REJECTIONS; `detail` and `cause`, with its traceback, are logged."""
        if reason not in REJECTIONS:
            detail, reason = f"{reason}: {detail}", "garbage"
        self._metrics.add("messages_rejected", reason, amount=count)
        if (more := self._limit.admit(self._clock(), reason, count=count)) is not None:
            logger.warning("message rejected (%s): %s%s", reason, detail, more, exc_info=cause)
