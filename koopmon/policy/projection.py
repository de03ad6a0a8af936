"""KSS by projection: which layers get a ceiling on the norms of their writing weights, and how low.

A layer maps x to x + F(x). A factor c on its writing weights turns an eigenvalue 1 + mu of one residual branch into
1 + c mu. For a layer of spectral radius rho, the factor (tau - 1) / (rho - 1) therefore leads to the radius tau.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from koopmon.wire.messages import MAX_HELD_LAYERS

MIN_FACTOR, MAX_FACTOR = 0.5, 1.5
"""Bounds of a factor in one command. Above 1, a ceiling rises again. Those of the proving ground (docs/evidence.md)."""
CALM_WEIGHT = 0.1
"""Weight of the newest calm snapshot in the means of radii. Chosen by hand."""


def calm_mean(before: float | None, radius: float) -> float:
    """Return the mean of a radius while calm, with that of one more calm snapshot; `before` is None at the first."""
    return radius if before is None else (1.0 - CALM_WEIGHT) * before + CALM_WEIGHT * radius


def calm_radii(before: Sequence[float], radii: Sequence[float]) -> tuple[float, ...]:
    """Return the mean radius of each layer while calm, with those of one more calm snapshot.

    A change of the number of layers starts the means again.
    """
    if len(before) != len(radii):
        return tuple(radii)
    return tuple(map(calm_mean, before, radii))


def largest_radius(layer: int, calm: Sequence[float], least: float) -> float:
    """Return tau, the radius that a ceiling leads to: the layer's mean radius while calm, and at least `least`."""
    return max(least, calm[layer]) if layer < len(calm) else least


def ceiling_factors(
    radii: Sequence[float], calm: Sequence[float], held: Collection[int], least: float
) -> Mapping[int, float]:
    """Return the factor on the ceilings of the layers above tau, and of those under ceilings, by layer.

    Args:
        radii: spectral radius of each layer.
        calm: mean radius of each layer while calm; empty while unknown.
        held: the layers under ceilings.
        least: lower bound on tau, above 1.

    Returns:
        Factors in [MIN_FACTOR, MAX_FACTOR], of at most MAX_HELD_LAYERS layers: those of the largest radii.
    """
    taus = {layer: largest_radius(layer, calm, least) for layer in range(len(radii))}
    over = [layer for layer, radius in enumerate(radii) if radius > taus[layer] or layer in held]
    widest = sorted(over, key=lambda layer: radii[layer], reverse=True)[:MAX_HELD_LAYERS]
    return {layer: _factor(radii[layer], taus[layer]) for layer in sorted(widest)}


def _factor(radius: float, tau: float) -> float:
    factor = (tau - 1.0) / (radius - 1.0) if radius > 1.0 else math.inf
    return min(max(factor, MIN_FACTOR), MAX_FACTOR)
