"""Centred states in principal coordinates, the input of the whitened fit in `koopmon.spectral.dmd`.

Rows are samples: a state has the shape (N samples, D width), the transpose of the paper's d x N (arXiv 2602.22988).

The paper whitens with the ZCA map Sigma^{-1/2} = E diag(c + eps)^{-1/2} E^T; E diag(c) E^T is the covariance of x
(eq. 6). This module projects both states onto the principal coordinates x E, where the same map is diagonal.
The two forms differ by the rotation E. A rotation changes no eigenvalue, singular value, resolvent norm, residual or
Frobenius norm, so every reported number is the ZCA one. No matrix square root is formed. A truncated E is (D, R).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

ABSENT = 1e-6
"""Smallest standard deviation of a present direction, as a share of the largest one.

Below it a float32 direction is rounding error: float32 has a relative precision of 1.2e-7. Chosen by hand.
"""

KRYLOV_DEPTH = 6
"""Powers of x^T x in the Krylov space. Chosen by hand."""
_EXACT_SIZE = 256
"""Largest smaller side, min(N, D), with an exact basis: up to it the eigendecomposition costs no more."""
_NOISE = 32.0
"""Rounding error of a centred constant, in machine epsilons of its magnitude. Chosen by hand."""
_SAFE = (1e-9, 1e9)
"""Largest magnitudes between which a state keeps its unit: float32 squares then neither overflow nor vanish."""


T = TypeVar("T")


def transition_pairs(states: Iterable[T], *, paired: bool) -> Iterable[tuple[T, T]]:
    """Return the start and the end of each transition: neighbours, or the two of each pair if `paired`."""
    each = iter(states)
    return zip(each, each, strict=True) if paired else pairwise(each)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """One transition in the K principal coordinates that its x has, in float64 and in the unit of its centred x."""

    x: Tensor
    """(N, K): centred inputs."""
    y: Tensor
    """(N, K): centred outputs, in the unit of x."""
    spread: Tensor
    """(K,), descending: norms of the columns of x."""
    ridge: Tensor
    """(): eps of eq. 6 in the squared unit of x."""
    size: int
    """Number of directions asked for, at least K."""


@dataclass(frozen=True, slots=True)
class Centred:
    """A state minus its mean over the samples."""

    values: Tensor
    """(N, D), divided by `unit`."""
    unit: float
    """Divisor of the state: 1 in the safe range, else the largest magnitude."""
    noise: float
    """Bound on the rounding error of one centred value, in the same unit."""


def product_dtype(*states: Tensor) -> torch.dtype:
    """Choose the dtype for products of whole states.

    Returns:
        float64 where a state is float64 or the process allows TF32 or bfloat16 in float32 products; float32 otherwise.
    """
    if any(state.dtype == torch.float64 for state in states):
        return torch.float64
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch raises it when the backends have different precisions
        exact = False
    return torch.float32 if exact else torch.float64


def largest_magnitude(state: Tensor, name: str) -> float:
    """Compute the largest magnitude in `state`; 0 for an empty one.

    Raises:
        ValueError: a value is not finite; the message holds `name`.
    """
    if state.numel() == 0:
        return 0.0
    # aminmax passes NaN on and needs no copy of the size of the state, unlike abs().
    low, high = torch.aminmax(state)
    magnitude = float(torch.maximum(-low, high))
    if not math.isfinite(magnitude):
        raise ValueError(f"{name} holds NaN or infinite values; only finite states have a spectrum")
    return magnitude


def centre(state: Tensor, magnitude: float, dtype: torch.dtype) -> Centred:
    """Centre `state` (N, D) over its samples in `dtype`.

    A state whose `magnitude` lies outside the safe range is divided by it first, so that squares do not overflow.
    """
    safe = _SAFE[0] < magnitude < _SAFE[1] or magnitude == 0.0
    unit = 1.0 if safe else magnitude
    values = state.to(dtype) if safe else state.to(dtype) / unit  # a division by 1 would cost a copy
    return Centred(values - values.mean(dim=0), unit, _NOISE * torch.finfo(dtype).eps * magnitude / unit)


def principal_coordinates(
    x: Tensor, svd_rank: int, seed: int, gram_dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Compute the leading right singular vectors of x, and x in these coordinates.

    A truncated basis of a large x comes from a randomised block Krylov SVD. Its private generator leaves the global
    random state unchanged. Where the Gram matrix costs no more, an exact eigendecomposition gives the basis.

    Args:
        x: (..., N, D), centred and finite.
        svd_rank: number of directions asked for, at least 1.
        seed: seed of the randomised SVD. Equal seeds give equal results.
        gram_dtype: dtype of the exact eigendecomposition.

    Returns:
        The basis (..., D, R) in the dtype of x, and x in it (..., N, R) in float64; R = min(svd_rank, N, D).
    """
    num_samples, width = x.shape[-2:]
    smaller = min(num_samples, width)
    rank = min(svd_rank, smaller)
    # A block has half as many columns as the rank, and at least 8, so the Krylov space exceeds the rank by far. Both
    # numbers were chosen by hand.
    block = max(8, (rank + 1) // 2)
    # The Krylov method solves an eigenproblem of (depth + 1) * block columns. Up to that size the exact one costs no
    # more.
    if smaller > max(_EXACT_SIZE, (KRYLOV_DEPTH + 1) * block):
        return _krylov_coordinates(x, rank, block, seed)
    wide = x.to(gram_dtype)
    directions: Tensor
    # eigh sorts ascending: the last columns, flipped, are the leading ones. The smaller of the two Gram matrices
    # decides the cost. From left singular vectors, x^T gives the right ones up to their norms, and QR normalises them.
    if num_samples >= width:
        directions = torch.linalg.eigh(wide.mT @ wide).eigenvectors[..., -rank:].flip(-1)
    else:
        samples = torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., -rank:].flip(-1)
        directions = torch.linalg.qr(wide.mT @ samples).Q
    return directions.to(x.dtype), (wide @ directions).double()


def _krylov_coordinates(x: Tensor, rank: int, block: int, seed: int) -> tuple[Tensor, Tensor]:
    """Compute the Ritz vectors of x^T x in span{Z, (x^T x) Z, ..., (x^T x)^depth Z}, Z (D, block) random.

    The source is Musco and Musco, arXiv 1504.05477. The span holds all polynomials in x^T x up to degree
    `KRYLOV_DEPTH` applied to Z, where a power iteration holds one. Many narrow blocks therefore converge faster than
    one wide block where the spectrum decays slowly.

    Returns:
        The basis (..., D, rank) in the dtype of x, and x in it (..., N, rank) in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(x.shape[-1], block, generator=generator, dtype=x.dtype).to(x.device)
    basis = torch.linalg.qr(probes.expand(*x.shape[:-2], -1, -1)).Q
    blocks = [x @ basis]
    for _ in range(KRYLOV_DEPTH):
        following = x.mT @ blocks[-1]
        # One orthogonalisation loses digits when one direction dominates: the new block then lies almost in the span.
        # The second one restores orthogonality.
        for _ in range(2):
            following = torch.linalg.qr(following - basis @ (basis.mT @ following)).Q
        basis = torch.cat((basis, following), dim=-1)
        blocks.append(x @ following)
    # Rayleigh-Ritz: the eigenvectors of (x Q)^T (x Q) are the best approximations inside the span of Q.
    images = torch.cat(blocks, dim=-1)
    double = images.double()
    ritz = torch.linalg.eigh(double.mT @ double).eigenvectors[..., -rank:].flip(-1).to(x.dtype)
    return basis @ ritz, (images @ ritz).double()


def transitions(
    states: Sequence[Tensor], names: Sequence[str], svd_rank: int | None, ridge: float, seed: int, *, paired: bool
) -> Iterator[Coordinates]:
    """Yield the coordinates of the L transitions among L+1 states, or in L pairs; each state is centred once.

    Args:
        states: L+1 tensors (N, D), finite; 2L if `paired`.
        names: a name for each state, for error messages.
        svd_rank: number of directions, at least 1; None for all D.
        ridge: eps of eq. 6, at least 0, in the squared unit of the states.
        seed: seed of the randomised SVD.
        paired: True for L pairs, each the two states of one transition.

    Yields:
        float64 coordinates, by depth. Full rank computes in float64; a truncated basis in `product_dtype`.

    Raises:
        ValueError: a state is not finite.
    """
    truncated = svd_rank is not None and svd_rank < states[0].shape[1]
    dtype = product_dtype(*states) if truncated else torch.float64
    magnitudes = [largest_magnitude(state, name) for state, name in zip(states, names, strict=True)]
    centred = (centre(state, magnitude, dtype) for state, magnitude in zip(states, magnitudes, strict=True))
    for x, y in transition_pairs(centred, paired=paired):
        yield _coordinates(x, y, svd_rank, ridge, seed)


def _coordinates(x: Centred, y: Centred, svd_rank: int | None, ridge: float, seed: int) -> Coordinates:
    """Project one transition onto the directions that x has.

    x without spread, or with fewer than 2 samples, gives coordinates with K = 0.
    """
    num_samples, width = x.values.shape
    size = width if svd_rank is None else min(svd_rank, width)
    if num_samples > 1:
        directions, x_NR = principal_coordinates(x.values, size, seed)
        spread = torch.linalg.vector_norm(x_NR, dim=0)
        # cumprod keeps the leading run of present directions. Centring removes one degree of freedom of the N samples.
        present = min(int((spread > ABSENT * spread.max()).cumprod(0).sum()), num_samples - 1)
    # N values with an error of at most `noise` each have a norm of at most noise * sqrt(N).
    if num_samples < 2 or spread.max() <= x.noise * num_samples**0.5:
        nothing = torch.zeros(num_samples, 0, dtype=torch.float64, device=x.values.device)
        return Coordinates(nothing, nothing, nothing.new_zeros(0), nothing.new_zeros(()), size)
    # x and y may have different units. y is converted to the unit of x, and the ridge of a variance to its square.
    y_NR = (y.values @ directions[:, :present]).double() * (y.unit / x.unit)
    return Coordinates(x_NR[:, :present], y_NR, spread[:present], spread.new_tensor(ridge / x.unit / x.unit), size)
