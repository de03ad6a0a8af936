"""Normalisation strength of a stack, from its update exponent k of ||y - x|| ~ ||x||^k.

Behind a normalisation k is 0 for all weights: twice the state gets the same update. Without one it is 1 for linear
layers, and larger where attention multiplies states. Near-unit mass and the share of reliable modes depend on the
initialisation and do not separate the two groups. `koopmon.chain_verifier.known_exponent` takes k = 0 from blocks with
normalisation modules. The states give k for other blocks.
"""

from __future__ import annotations

NORMALIZED, UNNORMALIZED = 0.2, 0.4
"""Exponents up to the first give strength 1, exponents from the second on give 0.

Both lie between the two groups of `benchmarks.brake` on transformers.
"""


def normalization_from_exponent(update_exponent: float) -> float:
    """Compute the normalisation strength in [0, 1]: 1 up to NORMALIZED, 0 from UNNORMALIZED on, linear between."""
    return min(max((UNNORMALIZED - update_exponent) / (UNNORMALIZED - NORMALIZED), 0.0), 1.0)
