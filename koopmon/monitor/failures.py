"""Internal errors of the monitor: counted, logged, and isolated from other runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from koopmon.logs import LogLimit
from koopmon.telemetry.metrics import ErrorPart, Metrics

logger = logging.getLogger(__name__)


class Failures:
    """Counts errors by `part`; logs each part and run at most once a minute. Thread-safe; nothing here raises."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._limit = LogLimit()

    def note(self, part: ErrorPart, error: Exception, *, run: str = "", what: str = "") -> None:
        """Count one error; log it with its traceback, its run, and its consequence `what`."""
        self.count(part)
        try:
            more = self._limit.admit(self._clock(), (part, run))
            if more is not None:
                whose = f"run {run}: " if run else ""
                words = f"{whose}{part}: {type(error).__name__}: {error}"
                logger.error("%s%s%s", words, f": {what}" if what else "", more, exc_info=error)
        except Exception:
            logger.exception("an error could not be logged")

    def count(self, part: ErrorPart) -> None:
        """Count one error that was logged elsewhere."""
        try:
            self._metrics.add("internal_errors", part)
        except Exception:
            logger.exception("an error could not be counted")

    @contextmanager
    def contained(self, part: ErrorPart, run: str = "") -> Iterator[None]:
        """Catch an error in the block and note it."""
        try:
            yield
        except Exception as error:
            self.note(part, error, run=run)
