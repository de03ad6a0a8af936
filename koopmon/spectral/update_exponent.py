"""Growth of a layer's update with its state, as an exponent: near 0 behind a normalisation, near 1 for linear layers.

Rows are samples: x and y have the shape (N, D). The definition is ours (docs/method.md, "Update exponent and
normalisation").
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

LENGTH_SHARE = 0.05
"""Variance of log-lengths below which lengths count as equal, as a share of 1 / (2 D). Chosen by hand.

1 / (2 D) is the variance of the log-length of a vector of D independent entries, as in a fresh embedding.
"""

LARGEST_EXPONENT = 100.0
"""Bound of the exponent. A sample without any update gives a slope without meaning. Chosen by hand."""


@torch.no_grad()
def update_exponent(x: Tensor, y: Tensor) -> Tensor:
    """Compute k of ||y - x|| ~ ||x||^k, the least-squares slope of the log-lengths over the samples.

    k is 0 for states of equal length, as behind a normalisation of the stream itself. k describes the initialisation.
    Training gives the updates their own directions, and k then says little. The function does not wait for the device.

    Args:
        x: (..., N, D): input states. Half precision becomes float32, whose lengths are exact from 1e-15 to 1e15.
        y: (..., N, D): output states of the same tokens.

    Returns:
        (...), float64, within [-100, 100]; 0 where values are not finite.
    """
    # The floor keeps the logarithm of a zero length finite.
    tiny = torch.finfo(torch.float64).tiny
    wide = torch.promote_types(x.dtype, torch.float32)
    x, y = x.to(wide), y.to(wide)
    lengths, updates = (torch.linalg.vector_norm(rows, dim=-1).double().clamp_min(tiny).log() for rows in (x, y - x))
    lengths, updates = (each - each.mean(-1, keepdim=True) for each in (lengths, updates))
    # Slope = cov / var of the centred logarithms. The added term keeps the slope near 0 where the lengths hardly vary;
    # without it rounding errors would decide the quotient.
    slope = (lengths * updates).mean(-1) / (lengths.square().mean(-1) + LENGTH_SHARE / (2 * x.shape[-1]))
    bounded: Tensor = slope.nan_to_num(0.0).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return bounded


@torch.no_grad()
def has_equal_lengths(states: Sequence[Tensor]) -> bool:
    """Return True if all samples of each state have one length, as behind a normalisation of the stream itself.

    Args:
        states: tensors (N, D), at least one.
    """
    tiny = torch.finfo(torch.float64).tiny
    for state in states:
        lengths = torch.linalg.vector_norm(state.double(), dim=-1).clamp_min(tiny).log()
        if not bool(lengths.var(correction=0) <= LENGTH_SHARE / (2 * state.shape[-1])):
            return False
    return True


def stack_exponent(exponents: Sequence[float]) -> float:
    """Compute one exponent for a stack: the lower of the first layer's exponent and the median over layers.

    Args:
        exponents: one exponent for each layer, by depth.

    Raises:
        ValueError: there are no layers.
    """
    # Deeper layers receive lengths that earlier layers shaped, for example experts that weigh tokens differently. Their
    # exponent can be high although they are normalised; the first layer's is then the lower one. Behind a Post-LN
    # only the first layer receives states that nothing has normalised; the median is then the lower one. A
    # normalisation that lowers either value counts.
    if not exponents:
        raise ValueError("exponents: none given, a stack has at least one layer")
    return min(exponents[0], float(statistics.median(exponents)))
