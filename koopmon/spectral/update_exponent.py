"""How a layer's update grows with the state: the exponent that tells whether a normalisation brakes it.

Rows are samples: x, y (N, D).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

LENGTH_SHARE = 0.05
"""Of the variance 1 / (2 D) that the logarithm of a length has where D entries are drawn independently, as in a fresh
embedding: lengths that vary by less count as equal."""

LARGEST_EXPONENT = 100.0
"""Bound of what is told: where single samples have no update at all the slope means nothing."""


@torch.no_grad()
def update_exponent(x: Tensor, y: Tensor) -> Tensor:
    """k of ||y - x|| ~ ||x||^k, the least-squares slope of the logarithms over the samples; 0-d float64, within +-100.

    Where the states are all of one length, as behind a normalisation of the stream itself, there is nothing that the
    update could grow with, and k is 0. Never synchronises. It is a property of the layer as it was initialised: once
    training has given updates directions of their own, how long a state is says little of how long they are.
    """
    tiny = torch.finfo(torch.float64).tiny
    wide = torch.promote_types(x.dtype, torch.float32)
    x, y = x.to(wide), y.to(wide)
    lengths, updates = (
        torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).clamp_min(tiny).log() for rows in (x, y - x)
    )
    lengths, updates = lengths - lengths.mean(), updates - updates.mean()
    slope = (lengths * updates).mean() / (lengths.square().mean() + LENGTH_SHARE / (2 * x.shape[-1]))
    bounded: Tensor = slope.nan_to_num(0.0, 0.0, 0.0).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return bounded


def stack_exponent(exponents: Sequence[float]) -> float:
    """One exponent for a whole stack: the first layer's or the median, whichever is lower.

    The first layer sees states whose lengths are the embedding's, and nothing else; deeper ones see lengths that the
    layers before have shaped, as experts do that weigh tokens differently, and grow with those although they are
    braked. Behind a Post-LN it is the other way round: only the first layer sees states that nothing has normalised. A
    brake that shows in either is one. Raises ValueError for no layers.
    """
    if not exponents:
        raise ValueError("exponents: none given, a stack has at least one layer")
    return min(exponents[0], float(statistics.median(exponents)))
