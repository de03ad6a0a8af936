"""The snapshots in which the signals that drift slowly are measured.

Attention logits and the log-partition of the output change over hundreds of steps. They cost as much as the states of a
small model. In a calm cadence some snapshots therefore repeat the values of an earlier one.
"""

from __future__ import annotations

MIN_STEPS = 32
"""Steps between two measurements in a calm cadence."""
DENSE_STEPS = 8
"""Snapshots that are closer to each other are dense: each has values of its own."""


class SlowSignals:
    """Decides for one kind of signals: `is_due` for each snapshot, in order, `note` after a measurement."""

    def __init__(self) -> None:
        self._last: int | None = None
        """Step of the last snapshot."""
        self._measured: int | None = None

    def is_due(self, step: int) -> bool:
        """Return True if the snapshot at `step` measures them."""
        last, self._last = self._last, step
        if last is None or self._measured is None or not self._measured <= last < step:
            return True
        return step - last < DENSE_STEPS or step - self._measured >= MIN_STEPS

    def note(self, step: int) -> None:
        """Note that they were measured at `step`."""
        self._measured = step
