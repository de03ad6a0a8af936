"""Growth of the update ratios at the start of a training, which a warm-up of the learning rate keeps slow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from koopmon.wire.messages import Step

START_STEPS = 20
"""Number of steps from the first snapshot on in which the ratios are compared with it."""
GROWTH = 10.0
"""Ratio of an update ratio to its first value that counts as 1. Chosen by hand."""
EXPLAINS = 0.4
"""Growth in this unit from which a missing warm-up explains an alarm of another signal. Chosen by hand."""
LEAST_RATIO = 0.25
"""Smallest first value: blocks whose last layer starts at zero begin with a ratio of 0."""
MAX_RISE = 2.0
"""Ratio of the scheduled rate to that of the first snapshot above which the schedule has a warm-up."""

LEAST_EXCESS = 0.2
"""Scheduled rate over the critical rate from which a missing warm-up does harm. Chosen by hand."""


@dataclass(frozen=True, slots=True)
class StartGrowth:
    """First snapshot of a training and the growth of its update ratios since then."""

    step: Step | None = None
    """Step of the first snapshot."""
    rate: Annotated[float, Meta(gt=0.0)] | None = None
    """Scheduled rate at that step; None where it is unknown, and once there is nothing more to compare."""
    ratios: Annotated[tuple[Annotated[float, Meta(ge=0.0)], ...], Meta(max_length=4096)] = ()
    """Update ratios of that snapshot."""
    value: Annotated[float, Meta(ge=0.0)] = 0.0
    """Largest growth of a layer's update ratio since then, in units of GROWTH; 0 with a warm-up and after the start."""
    layer: Annotated[int, Meta(ge=0)] = 0
    """The layer that grew most."""

    def after(self, step: int, rate: float | None, ratios: tuple[float, ...]) -> StartGrowth:
        """Return the history after the snapshot of `step`, with the scheduled rate; None where it is unknown."""
        if self.step is None:
            known = rate is not None and 0.0 < rate < math.inf and ratios
            return StartGrowth(step, rate, ratios) if known else StartGrowth(step)
        if self.rate is None or not 0 < step - self.step <= START_STEPS or len(ratios) != len(self.ratios):
            return StartGrowth(self.step)
        if rate is None or not 0.0 < rate <= MAX_RISE * self.rate:
            return StartGrowth(self.step)
        grown = [new / max(first, LEAST_RATIO) for first, new in zip(self.ratios, ratios, strict=True)]
        layer = grown.index(max(grown))
        return StartGrowth(self.step, self.rate, self.ratios, grown[layer] / GROWTH, layer)
