"""Band of a scalar's own history, for values that have no threshold of their own: kl, entropy, reward, loss."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace

from koopmon.risk.loss_zscore import ABSURD

WINDOW = 50
"""Number of values in the history."""
MIN_VALUES = 20
"""Number of earlier values that a band needs, and of values in a row outside it that become the new history."""
NUM_DEVIATIONS = 5.0
"""Half width of the band. In 20 simulated series of 1,000 values each of white noise, Student's t, a lognormal,
autoregressive processes and a random walk, at most one left the band."""
DEPARTURE = 3
"""Number of values in a row outside the band that make a departure: one outlier is none."""


@dataclass(frozen=True, slots=True)
class BandReading:
    """One value with the band before it, mean +- NUM_DEVIATIONS deviations; None with fewer than MIN_VALUES values."""

    step: int
    value: float
    low: float | None = None
    high: float | None = None
    departed: bool = False
    """True for the value that makes a departure."""


@dataclass(slots=True)
class Band:
    """History of one scalar. Values outside the band do not widen it, unless they stay there."""

    upper_only: bool = False
    """True for a scalar that may fall at any rate, such as the loss."""
    reading: BandReading | None = None
    """The latest reading."""
    _inside: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _outside: list[float] = field(default_factory=list)

    def read(self, step: int, value: float) -> BandReading:
        """Add the value of `step`. A repeated step adds nothing, because peers repeat their latest value."""
        if self.reading is not None and self.reading.step == step:
            self.reading = replace(self.reading, departed=False)
            return self.reading
        low, high = self._limits()
        usable = abs(value) < ABSURD  # False for NaN
        self.reading = BandReading(step, value, low, high)
        if usable and (low is None or high is None or (value <= high and (self.upper_only or value >= low))):
            self._inside.append(value)
            self._outside.clear()
            return self.reading
        self._outside.append(value)
        self.reading = replace(self.reading, departed=low is not None and len(self._outside) == DEPARTURE)
        if len(self._outside) == MIN_VALUES:
            self._inside = deque((each for each in self._outside if abs(each) < ABSURD), maxlen=WINDOW)
            self._outside.clear()
        return self.reading

    def read_measured(self, step: int, value: float) -> BandReading:
        """Add the value of `step` as `read` does, unless it repeats the latest one.

        A script that logs its loss at fewer steps than snapshots exist repeats it.
        """
        known = self.reading
        return self.read(step if known is None or known.value != value else known.step, value)

    def _limits(self) -> tuple[float, float] | tuple[None, None]:
        if len(self._inside) < MIN_VALUES:
            return None, None
        # statistics.pstdev takes five times as long, because it computes with fractions.
        mean = math.fsum(self._inside) / len(self._inside)
        variance = math.fsum((each - mean) ** 2 for each in self._inside) / len(self._inside)
        # The same lower bounds on the deviation as in LossZScore.
        width = NUM_DEVIATIONS * (math.sqrt(variance) + 1e-3 * abs(mean) + 1e-12)
        return mean - width, mean + width
