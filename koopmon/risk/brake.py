"""Whether anything brakes the growth of the residual stream: read from the update exponent.

A layer's update grows with the state as ||y - x|| ~ ||x||^k. Behind a normalisation k is 0, whatever is learned: twice
the state gets the same update. Without one it is 1 for linear layers, and more where attention multiplies states. Over
165 untrained models of six residual schemes, two initialisations, two tasks and six sizes the exponent of the stack was
at most 0.22 with a normalisation and at least 0.37 without; near-unit mass and the share of reliable modes change sides
with the initialisation.
"""

from __future__ import annotations

BRAKED, UNBRAKED = 0.2, 0.4
"""Exponents up to the first count as fully braked, from the second on as not at all."""


def brake(update_exponent: float) -> float:
    """1 where normalisations hold the updates, 0 where nothing does; linear between."""
    return min(max((UNBRAKED - update_exponent) / (UNBRAKED - BRAKED), 0.0), 1.0)
