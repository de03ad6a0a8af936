"""Least stride of a run's snapshots that the engine can judge.

Agents follow it, so that a loaded monitor does not receive snapshots that it drops. It grows to the stride that the
engine has kept up with, and falls when the engine has time left. Times are seconds of the caller's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from koopmon.wire.messages import MAX_MIN_STRIDE

WINDOW_SECONDS = 5.0
"""Shortest time between two changes: long against the first profile, which is slow."""
MAX_SKIPPED = 0.2
"""Share of a run's snapshots that may be dropped for newer ones before the stride grows."""
MAX_BUSY = 0.7
"""Share of its time for which the engine may be busy after the stride has fallen."""


@dataclass(slots=True)
class Pacing:
    """Stride of one run: a power of two, so that few changes lead to any stride.

    `steps` is in force from `from_step` on.
    """

    steps: int = 1
    from_step: int = 0
    _began: float = -math.inf
    """Start of the window; it ends with the first judged snapshot after WINDOW_SECONDS."""
    _first_step: int = 0
    _busy_before: float = 0.0
    _num_judged: int = 0
    _num_skipped: int = 0

    def on_skipped(self) -> None:
        """Count a snapshot that the engine dropped for a newer one."""
        self._num_skipped += 1

    def on_judged(self, now: float, step: int, busy_seconds: float) -> int:
        """Count a judged snapshot of `step`; return the stride to change to, or the present one.

        `busy_seconds` is the total computing time of the engine for all runs.
        """
        self._num_judged += 1
        elapsed = now - self._began
        if elapsed < WINDOW_SECONDS:
            return self.steps
        wanted = float(self.steps)
        if math.isfinite(elapsed) and step >= self.from_step:
            if self._num_skipped > MAX_SKIPPED * (self._num_skipped + self._num_judged):
                wanted = max(wanted, (step - self._first_step) / self._num_judged)
            elif not self._num_skipped:
                wanted *= min(1.0, (busy_seconds - self._busy_before) / (MAX_BUSY * elapsed))
        self._began, self._first_step, self._busy_before = now, step, busy_seconds
        self._num_judged = self._num_skipped = 0
        exponent = math.ceil(math.log2(max(1.0, wanted)))
        return min(1 << exponent, MAX_MIN_STRIDE)

    def change(self, steps: int, from_step: int) -> None:
        """Put a stride in force from a later step on."""
        self.steps, self.from_step = steps, from_step
