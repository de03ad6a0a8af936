"""Internal errors of the monitor: counted, logged, and isolated from other runs."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from koopmon.telemetry.metrics import ErrorPart, Metrics

logger = logging.getLogger(__name__)

LOG_SECONDS = 60.0
MAX_PLACES = 1024
"""Maximum number of pairs of part and run with a stored time of the last log line."""


class Failures:
    """Counts errors by `part`; logs each part and run at most once a minute. Thread-safe; nothing here raises."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._metrics = metrics
        self._clock = clock
        self._lock = threading.Lock()
        self._logged_at: OrderedDict[tuple[ErrorPart, str], float] = OrderedDict()
        self._silent: dict[tuple[ErrorPart, str], int] = {}

    def note(self, part: ErrorPart, error: Exception, *, run: str = "", what: str = "") -> None:
        """Count one error; log it with its traceback, its run, and its consequence `what`."""
        self.count(part)
        try:
            silent = self._due((part, run))
            if silent is not None:
                whose = f"run {run}: " if run else ""
                more = f" ({silent} more since the last such line)" if silent else ""
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

    def _due(self, place: tuple[ErrorPart, str]) -> int | None:
        """Return None within a minute of the last line for `place`, else the number of errors since that line."""
        now = self._clock()
        with self._lock:
            logged_at = self._logged_at.get(place)
            if logged_at is not None and now - logged_at < LOG_SECONDS:
                self._silent[place] = self._silent.get(place, 0) + 1
                return None
            self._logged_at[place] = now
            self._logged_at.move_to_end(place)
            if len(self._logged_at) > MAX_PLACES:
                oldest, _ = self._logged_at.popitem(last=False)
                self._silent.pop(oldest, None)
            return self._silent.pop(place, 0)
