"""Growth of the largest attention logit over the run's own level."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from koopmon.wire.messages import Step

SPACING = 10
"""Least number of steps between two logits of the history. Dense snapshots would fill it within the fault."""
NUM_LOGITS, MIN_LOGITS = 10, 8
"""Number of logits in the history, and the smallest number of them that gives a level."""
LEAST_LOGIT = 30.0
"""Logit below which no growth counts. Chosen by hand: at the best rates of `benchmarks.proving_ground` 17 to 66."""
GROWTH = 2.5
"""Ratio of the newest logit to the level that counts as 1. Chosen by hand."""


@dataclass(frozen=True, slots=True)
class LogitGrowth:
    """History of the largest attention logit and the growth of its newest value."""

    logits: Annotated[tuple[Annotated[float, Meta(gt=0.0)], ...], Meta(max_length=NUM_LOGITS)] = ()
    """Earlier logits, oldest first, at least SPACING steps apart."""
    step: Step | None = None
    """Step of the last one."""
    value: Annotated[float, Meta(ge=0.0)] = 0.0
    """Newest logit over the level, in units of GROWTH; 0 below LEAST_LOGIT or without enough logits.

    The level is the median of `logits`, and at least 1.
    """

    def after(self, step: int, logit: float | None) -> LogitGrowth:
        """Return the history after the snapshot of `step`, a later one; `logit` is None where it is unknown."""
        if logit is None or not 0.0 < logit < math.inf:
            return LogitGrowth(self.logits, self.step)
        known = len(self.logits) >= MIN_LOGITS and logit >= LEAST_LOGIT
        value = logit / (max(statistics.median(self.logits), 1.0) * GROWTH) if known else 0.0
        if self.step is not None and step - self.step < SPACING:
            return LogitGrowth(self.logits, self.step, value)
        return LogitGrowth((*self.logits, logit)[-NUM_LOGITS:], step, value)
