"""z-score of the newest loss against the last losses of the same run."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Annotated

from msgspec import Meta

WINDOW = 20
"""Number of losses in the history. Chosen by hand."""
MIN_LOSSES = 5
"""Number of earlier losses that a z-score needs. Chosen by hand."""
LARGEST = 1e6
"""Largest z-score. A loss of ABSURD or more, or NaN, has it too. Chosen by hand."""
ABSURD = 1e30
"""Magnitude from which a loss counts as not finite: its square is still finite in float64. Chosen by hand."""


@dataclass(frozen=True, slots=True)
class LossZScore:
    """History of the loss and the z-score of its newest value."""

    losses: Annotated[tuple[Annotated[float, Meta(ge=-ABSURD, le=ABSURD)], ...], Meta(max_length=WINDOW)] = ()
    """The last usable losses, oldest first, at most WINDOW."""
    value: Annotated[float, Meta(le=LARGEST)] = 0.0
    """z-score of the newest loss against the earlier ones, at most LARGEST; 0 with fewer than MIN_LOSSES of them."""

    def after(self, loss: float | None) -> LossZScore:
        """Return the history after one more snapshot; `loss` is None where it is unknown."""
        # A script that logs its loss at fewer steps than snapshots exist repeats it. Repeated values would lower the
        # deviation.
        if loss is None or (self.losses and loss == self.losses[-1]):
            return self
        if not abs(loss) < ABSURD:  # The comparison is also False for NaN.
            return replace(self, value=LARGEST)
        return LossZScore((*self.losses, loss)[-WINDOW:], self._z_score(loss))

    def _z_score(self, loss: float) -> float:
        """Compute the z-score of `loss` against the earlier losses."""
        if len(self.losses) < MIN_LOSSES:
            return 0.0
        # 0.1% of the mean and 1e-12 bound the deviation from below, so noise on a flat loss gives no huge z-score. Both
        # were chosen by hand.
        mean = statistics.fmean(self.losses)
        # statistics.pstdev is exact, in fractions, and takes twenty times as long.
        spread = math.sqrt(math.fsum([(each - mean) ** 2 for each in self.losses]) / len(self.losses))
        deviation = spread + 1e-3 * abs(mean) + 1e-12
        return min((loss - mean) / deviation, LARGEST)
