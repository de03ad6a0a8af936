"""`koopmon run --allow-stop`: ends a job whose training goes on after an applied request to stop."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from koopmon.errors import StoreError

POLL_SECONDS = 2.0
GRACE_STEPS = 20
"""Optimizer steps after the request from which on its loop is taken to ignore it. A loop may look every few steps."""
LAST_DECISIONS = 20
"""Decisions in which the request is looked for. A run that is to stop gets no other command."""
ENDED_BY_KOOPMON = 70
"""Exit status of `koopmon run` after it has ended the job: EX_SOFTWARE of sysexits.h."""


class JobStop:
    """Looks in the history of `run` for a request to stop that the training ignores.

    `due` is true from then on. The loop of an unchanged script reads no request, while a trainer with a callback ends
    by itself.
    """

    def __init__(self, store: Path, run: str) -> None:
        self.due = False
        self.reason = ""
        """The reason of the request."""
        self._store = store
        self._run = run
        self._since = time.time()
        self._polled_at = 0.0

    def __call__(self) -> bool:
        """Look again, at most every POLL_SECONDS. Returns `due`."""
        now = time.monotonic()
        if not self.due and now - self._polled_at >= POLL_SECONDS and self._store.exists():
            self._polled_at = now
            with contextlib.suppress(StoreError):  # the monitor has not made its tables yet
                self._look()
        return self.due

    def _look(self) -> None:
        # Imported late because the job waits for every import of the launcher.
        from koopmon.history.reader import HistoryReader

        with HistoryReader.open(self._store) as history:
            for decision in list(history.decisions(self._run, last=LAST_DECISIONS)):
                for row in decision.commands:
                    stops = row.command.kind == "stop" and row.outcome == "applied"
                    if not stops or row.acked_step is None or decision.time < self._since:
                        continue
                    beats = [each for each in history.heartbeats(self._run) if each.incarnation == decision.incarnation]
                    if beats and max(beat.step for beat in beats) >= row.acked_step + GRACE_STEPS:
                        self.due, self.reason = True, row.command.reason
