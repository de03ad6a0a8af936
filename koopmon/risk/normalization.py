"""Whether anything brakes the growth of the residual stream: read from the update exponent.

A layer's update grows with the state as ||y - x|| ~ ||x||^k. Behind a normalisation k is 0, whatever is learned: twice
the state gets the same update. Without one it is 1 for linear layers, and more where attention multiplies states.
Near-unit mass and the share of reliable modes change sides with the initialisation; the exponent does not. Where blocks
hold normalisations it is taken to be 0, and it is read from states where they do not, or where none can be seen
(`koopmon.chain_verifier.known_exponent`).
"""

from __future__ import annotations

NORMALIZED, UNNORMALIZED = 0.2, 0.4
"""Exponents up to the first count as fully braked, from the second on as not at all."""


def normalization_from_exponent(update_exponent: float) -> float:
    """1 where normalisations hold the updates, 0 where nothing does; linear between."""
    return min(max((UNNORMALIZED - update_exponent) / (UNNORMALIZED - NORMALIZED), 0.0), 1.0)
