"""Arithmetic on numbers that may be missing, or too large for their sum."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from fractions import Fraction

LARGEST = "max_"
"""Start of the names of observables of which the largest value counts, over calls, ranks and adjacent layers.

Of all others the mean counts.
"""
MAX_SINGLE = float.fromhex("0x1.fffffep127")
"""Largest float32."""


def mean(values: Iterable[float | None]) -> float | None:
    """Compute the mean of the known values: None without any, NaN if one is not finite.

    The mean of finite values is finite, even where their sum overflows.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    if not all(map(math.isfinite, known)):
        return math.nan
    try:
        return math.fsum(known) / len(known)
    except OverflowError:
        # Fractions have no largest value, and the mean lies between the smallest and the largest value.
        return float(sum(map(Fraction, known)) / len(known))


def to_single(values: Iterable[float]) -> tuple[float, ...]:
    """Round to float32, within its range. A history keeps such numbers without a loss in half of the bytes."""
    return tuple(array("f", [min(max(value, -MAX_SINGLE), MAX_SINGLE) for value in values]))
