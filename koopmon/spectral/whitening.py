"""Centred states in their principal coordinates: the ground on which the whitened operator is fitted.

Rows are samples throughout: a state is (N samples, D width), the transpose of the paper's d x N.

The paper whitens with the ZCA map Sigma^{-1/2} = E diag(c + eps)^{-1/2} E^T, where E diag(c) E^T is the covariance of x
(eq. 6). Here both states are first turned into the principal coordinates x E, where the same map is diagonal. The two
differ by the rotation E, which changes no eigenvalue, singular value, resolvent norm, residual or Frobenius norm: every
number that is reported is the ZCA one, and no matrix square root is formed. With a truncation E is (D, R).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ABSENT = 1e-6
"""A principal direction whose standard deviation is below this share of the largest one counts as absent."""

KRYLOV_DEPTH = 6
_EXACT_SIZE = 256
_NOISE = 32.0
_SAFE = (1e-9, 1e9)


@dataclass(frozen=True, slots=True)
class Coordinates:
    """One transition in the principal coordinates of its x, float64, in units of the largest magnitude in x.

    x, y (N, K): centred samples. spread (K,): norms of the columns of x, descending. ridge (): eps of eq. 6 in these
    units. K is the number of directions present, at most `size`, the number asked for.
    """

    x: Tensor
    y: Tensor
    spread: Tensor
    ridge: Tensor
    size: int


@dataclass(frozen=True, slots=True)
class Centred:
    """A state (N, D) minus its mean, in units of `unit`; `noise` is the rounding error that the mean leaves behind."""

    values: Tensor
    unit: float
    noise: float


def product_dtype(*states: Tensor) -> torch.dtype:
    """The dtype for products of whole states: float32, or float64 where a state is or float32 products are inexact.

    Training scripts like to let TF32 or bfloat16 stand in for float32 in matrix products.
    """
    if any(state.dtype == torch.float64 for state in states):
        return torch.float64
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch's answer when some backend was set apart from the others
        exact = False
    return torch.float32 if exact else torch.float64


def largest_magnitude(state: Tensor, name: str) -> float:
    """The largest magnitude in `state`, 0 when it is empty. Raises ValueError naming `name` when a value is not
    finite."""
    if state.numel() == 0:
        return 0.0
    low, high = torch.aminmax(state)
    magnitude = float(torch.maximum(-low, high))
    if not math.isfinite(magnitude):
        raise ValueError(f"{name} holds NaN or infinite values; only finite states have a spectrum")
    return magnitude


def centre(state: Tensor, magnitude: float, dtype: torch.dtype) -> Centred:
    """`state` (N, D) in `dtype`, centred over its samples; first divided by `magnitude` if squares could overflow."""
    unit = 1.0 if _SAFE[0] < magnitude < _SAFE[1] or magnitude == 0.0 else magnitude
    values = state.to(dtype) if unit == 1.0 else state.to(dtype) / unit
    return Centred(values - values.mean(dim=0), unit, _NOISE * torch.finfo(dtype).eps * magnitude / unit)


def principal_coordinates(
    x: Tensor, svd_rank: int, seed: int, gram_dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The R = min(svd_rank, N, D) leading right singular vectors of centred x (..., N, D), and x in them.

    Columns (..., D, R) in the dtype of x, and (..., N, R) in float64.

    A truncated basis of a large x comes from a randomised block Krylov SVD with a private generator: deterministic for
    `seed`, and the global random state is never touched. Where the Gram matrix is as cheap the basis is exact.
    """
    num_samples, width = x.shape[-2:]
    smaller = min(num_samples, width)
    rank = min(svd_rank, smaller)
    block = max(8, (rank + 1) // 2)
    if smaller > max(_EXACT_SIZE, (KRYLOV_DEPTH + 1) * block):
        return _krylov_coordinates(x, rank, block, seed)
    wide = x.to(gram_dtype)
    directions: Tensor
    if num_samples >= width:
        directions = torch.linalg.eigh(wide.mT @ wide).eigenvectors[..., -rank:].flip(-1)
    else:
        samples = torch.linalg.eigh(wide @ wide.mT).eigenvectors[..., -rank:].flip(-1)
        directions = torch.linalg.qr(wide.mT @ samples).Q
    return directions.to(x.dtype), (wide @ directions).double()


def _krylov_coordinates(x: Tensor, rank: int, block: int, seed: int) -> tuple[Tensor, Tensor]:
    """Randomised block Krylov: the Ritz vectors of x^T x in span{Z, (x^T x) Z, ..., (x^T x)^depth Z}, Z (D, block).

    Narrow blocks, many of them: the span has polynomials of degree `KRYLOV_DEPTH` to choose from, where the power
    iteration of a wide block has one. For the same work the basis is orders of magnitude closer where the spectrum
    decays slowly.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(x.shape[-1], block, generator=generator, dtype=x.dtype).to(x.device)
    basis = torch.linalg.qr(probes.expand(*x.shape[:-2], -1, -1)).Q
    blocks = [x @ basis]
    for _ in range(KRYLOV_DEPTH):
        following = x.mT @ blocks[-1]
        for _ in range(2):  # twice is enough: the block lies almost wholly in the span when one direction dominates
            following = torch.linalg.qr(following - basis @ (basis.mT @ following)).Q
        basis = torch.cat((basis, following), dim=-1)
        blocks.append(x @ following)
    images = torch.cat(blocks, dim=-1)
    double = images.double()
    ritz = torch.linalg.eigh(double.mT @ double).eigenvectors[..., -rank:].flip(-1).to(x.dtype)
    return basis @ ritz, (images @ ritz).double()


def transitions(
    states: Sequence[Tensor], names: Sequence[str], svd_rank: int | None, ridge: float, seed: int
) -> Iterator[Coordinates]:
    """The L transitions of L+1 states (N, D) one after the other, each state centred once.

    Full rank works in float64; the basis of a truncation in float32, unless the states are float64 or the process has
    traded the precision of float32 products for speed. Coordinates are float64.
    """
    truncated = svd_rank is not None and svd_rank < states[0].shape[1]
    dtype = product_dtype(*states) if truncated else torch.float64
    magnitudes = [largest_magnitude(state, name) for state, name in zip(states, names, strict=True)]
    current = centre(states[0], magnitudes[0], dtype)
    for state, magnitude in zip(states[1:], magnitudes[1:], strict=True):
        following = centre(state, magnitude, dtype)
        yield _coordinates(current, following, svd_rank, ridge, seed)
        current = following


def _coordinates(x: Centred, y: Centred, svd_rank: int | None, ridge: float, seed: int) -> Coordinates:
    num_samples, width = x.values.shape
    size = width if svd_rank is None else min(svd_rank, width)
    if num_samples > 1:
        directions, x_NR = principal_coordinates(x.values, size, seed)
        spread = torch.linalg.vector_norm(x_NR, dim=0)
        present = min(int((spread > ABSENT * spread.max()).cumprod(0).sum()), num_samples - 1)
    if num_samples < 2 or spread.max() <= x.noise * num_samples**0.5:
        nothing = torch.zeros(num_samples, 0, dtype=torch.float64, device=x.values.device)
        return Coordinates(nothing, nothing, nothing.new_zeros(0), nothing.new_zeros(()), size)
    y_NR = (y.values @ directions[:, :present]).double() * (y.unit / x.unit)
    return Coordinates(x_NR[:, :present], y_NR, spread[:present], spread.new_tensor(ridge / x.unit / x.unit), size)
