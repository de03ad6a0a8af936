"""Parameter groups whose learning rate has outgrown that of the other groups since a copy was taken.

A single group at a rate that is too high, as that of the attention, ruins a training whose other groups are healthy.
A rate that is lowered for all groups stops these others. A rewind therefore bounds the rate of such a group by its
share of another group's rate, as it was when the copy was taken. The bound has no effect once the schedule itself is
within it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

OUTGROWN = 2.0
"""Growth of a group's rate, by itself and relative to the other groups, from which it is bounded. Chosen by hand."""
PREFIX = "share"

Shares = Mapping[int, tuple[int, float]]
"""Index of a bounded group: the index of the group that it is compared with, and its largest rate over that rate."""


def outgrown(before: Sequence[float], now: Sequence[float]) -> Shares:
    """Return the groups whose rates grew by a factor of OUTGROWN since `before`, relative to the typical group as well.

    The typical group is that of the lower median growth. Rates of 0 are left out, and other numbers of groups have no
    result.
    """
    if len(before) != len(now):
        return {}
    usable = [each for each in range(len(now)) if 0.0 < before[each] < math.inf and 0.0 < now[each] < math.inf]
    growth = {each: now[each] / before[each] for each in usable}
    if not growth:
        return {}
    typical = sorted(usable, key=lambda each: (growth[each], each))[(len(usable) - 1) // 2]
    least = OUTGROWN * max(growth[typical], 1.0)
    return {each: (typical, before[each] / before[typical]) for each in usable if growth[each] >= least}


def factors(shares: Shares, rates: Sequence[float]) -> list[float]:
    """Return the factor in (0, 1] on each rate that bounds the groups in `shares`."""
    found = [1.0] * len(rates)
    for each, (typical, share) in shares.items():
        if max(each, typical) < len(rates) and rates[each] > 0.0 and (bound := share * rates[typical]) > 0.0:
            found[each] = min(1.0, bound / rates[each])
    return found


def as_parameters(shares: Shares) -> dict[str, float]:
    """Return `shares` as parameters of an action."""
    return {f"{PREFIX}.{each}.{typical}": share for each, (typical, share) in shares.items()}


def from_parameters(parameters: Mapping[str, int | float]) -> Shares:
    """Return the shares among the parameters of an action."""
    found = {}
    for name, share in parameters.items():
        prefix, _, indices = name.partition(".")
        if prefix == PREFIX and 0.0 < share < math.inf:
            each, typical = map(int, indices.split("."))
            found[each] = typical, float(share)
    return found
