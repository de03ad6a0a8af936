"""How far the logged loss lies above what the run's own last ones let expect: its z-score."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Annotated

from msgspec import Meta

WINDOW = 20
"""Losses that are looked back on."""
MIN_LOSSES = 5
"""So many must be known before one can surprise."""
LARGEST = 1e6
"""Also of a loss that is absurd."""
ABSURD = 1e30
"""From here on, as of NaN, nothing can be computed."""


@dataclass(frozen=True, slots=True)
class LossZScore:
    """`losses` are the last sensible ones, oldest first; `value` the z-score of the newest against those before it."""

    losses: Annotated[tuple[Annotated[float, Meta(ge=-ABSURD, le=ABSURD)], ...], Meta(max_length=WINDOW)] = ()
    value: Annotated[float, Meta(le=LARGEST)] = 0.0

    def after(self, loss: float | None) -> LossZScore:
        """With the loss that came with one more snapshot.

        The same value again is no news: a script may log more seldom than snapshots are taken.
        """
        if loss is None or (self.losses and loss == self.losses[-1]):
            return self
        if not abs(loss) < ABSURD:  # NaN too
            return replace(self, value=LARGEST)
        return LossZScore((*self.losses, loss)[-WINDOW:], self._z_score(loss))

    def _z_score(self, loss: float) -> float:
        if len(self.losses) < MIN_LOSSES:
            return 0.0
        mean = statistics.fmean(self.losses)
        deviation = statistics.pstdev(self.losses, mean) + 1e-3 * abs(mean) + 1e-12
        return min((loss - mean) / deviation, LARGEST)
