"""Collapse of the spectral radii: blocks that overwrite the stream, as Post-LN blocks do at a rate that is too high.

Behind a norm of the stream itself, the first block turns short embeddings into long states: its radius is large at the
start and falls. At a rate that is too high it falls too far, no block keeps what distinguishes the tokens, and the
model learns nothing more. Residual streams without such a norm start with radii of about 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

FALL = 13.0
"""Ratio of the radius at the start to the newest one that counts as 1. Chosen by hand."""
SNAPSHOTS = 3
"""Number of snapshots whose largest radius is that of the start, and of later ones in a row that must have fallen."""


@dataclass(frozen=True, slots=True)
class RadiusFall:
    """Radius of the first snapshots, and the fall of the newest ones. A radius is the largest one of all layers."""

    level: Annotated[float, Meta(ge=0.0)] = 0.0
    """Largest radius of the first snapshots."""
    num_first: Annotated[int, Meta(ge=0, le=SNAPSHOTS)] = 0
    """Number of them so far."""
    num_fallen: Annotated[int, Meta(ge=0)] = 0
    """Number of the newest radii in a row that have fallen by FALL."""
    value: Annotated[float, Meta(ge=0.0)] = 0.0
    """Fall of the newest radius, in units of FALL; 0 until SNAPSHOTS of them have fallen."""

    def after(self, radius: float | None) -> RadiusFall:
        """Return the history after a snapshot with the largest spectral radius `radius`; None where it is unknown."""
        if radius is None or not 0.0 < radius < math.inf:
            return RadiusFall(self.level, self.num_first)
        if self.num_first < SNAPSHOTS:
            return RadiusFall(max(self.level, radius), self.num_first + 1)
        fall = min(self.level / radius / FALL, 1e6)
        num_fallen = self.num_fallen + 1 if fall >= 1.0 else 0
        return RadiusFall(self.level, SNAPSHOTS, num_fallen, fall if num_fallen >= SNAPSHOTS else 0.0)
