"""Bounds on the learning rates of single parameter groups.

One group at a rate that is too high, such as that of the attention, ruins a training whose other groups are healthy. A
lower rate for all groups stops these others. A rewind therefore bounds the rate of such a group by its share: its rate
over the largest rate of the other groups, as it was when the copy was taken. The group then follows the schedule of the
others. The bound has no effect where the group's own rate is within it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import median_low

from koopmon.agent.control.state import ActionState
from koopmon.wire.messages import MAX_RATE

OUTGROWN = 2.0
"""Least growth of a group's rate, over that of the typical group, from which it is bounded. Chosen by hand."""
MIN_FACTOR = 1e-9
"""Lower bound on a factor: the update needs one above 0, to give back a rate that the step has written."""
PREFIX = "share."
BOUNDED_AT = "bounded_at"
"""Name of the step at which a rewind added bounds, among the parameters of an action."""

Shares = Mapping[int, float]
"""Share of each bounded group, by the group's index over all optimizers."""


def outgrown(
    before: Sequence[float], now: Sequence[float], max_rate: float, bounded: Collection[int] = ()
) -> list[int]:
    """Return the groups above `max_rate` whose rates grew OUTGROWN times as much as the typical one since `before`.

    The typical growth is the lower median, and at least 1. Groups in `bounded`, and those whose rate was or is 0,
    infinite or NaN, are left out. If the number of groups changed, none is returned.
    """
    if len(before) != len(now):
        return []
    pairs = enumerate(zip(before, now, strict=True))
    growth = {
        each: new / old
        for each, (old, new) in pairs
        if each not in bounded and 0.0 < old < math.inf and 0.0 < new < math.inf
    }
    least = OUTGROWN * max(median_low(growth.values()), 1.0) if growth else math.inf
    return [each for each, grown in growth.items() if grown >= least and now[each] > max_rate]


def shares_of(groups: Collection[int], rates: Sequence[float]) -> Shares:
    """Return the shares that `groups` have at these rates; empty if no other group has a rate above 0."""
    largest = _largest_other(groups, rates)
    return {each: min(rates[each] / largest, MAX_RATE) for each in groups if rates[each] > 0.0} if largest else {}


def factors(shares: Shares, rates: Sequence[float]) -> list[float]:
    """Return the factor in (0, 1] on each rate that bounds the groups in `shares`.

    Without another group at a rate above 0 all are 1.
    """
    largest = _largest_other(shares, rates)
    return [
        min(1.0, max(MIN_FACTOR, shares[each] * largest / rate)) if largest and rate > 0.0 and each in shares else 1.0
        for each, rate in enumerate(rates)
    ]


def _largest_other(groups: Collection[int], rates: Sequence[float]) -> float:
    return max((rate for each, rate in enumerate(rates) if each not in groups and 0.0 < rate < math.inf), default=0.0)


def as_parameters(shares: Shares) -> dict[str, int | float]:
    """Return `shares` as parameters of an action."""
    return {f"{PREFIX}{each}": share for each, share in shares.items()}


def from_parameters(parameters: Mapping[str, int | float]) -> dict[int, float]:
    """Return the shares among the parameters of an action. Those out of bounds are left out."""
    named = ((name.removeprefix(PREFIX), share) for name, share in parameters.items() if name.startswith(PREFIX))
    return {int(each): float(share) for each, share in named if each.isdecimal() and 0.0 < share <= MAX_RATE}


def in_force(rewind: ActionState | None) -> dict[int, float]:
    """Return the shares that the last rewind left in force, from its part of the state; empty once released."""
    return {} if rewind is None or rewind.ramp.target == 0.0 else from_parameters(rewind.parameters)
