"""Centred states in principal coordinates, the input of the whitened fit in `koopmon.spectral.dmd`.

Rows are samples: a state has the shape (N samples, D width), the transpose of the paper's d x N (arXiv 2602.22988).

The paper whitens with the ZCA map Sigma^{-1/2} = E diag(c + eps)^{-1/2} E^T; E diag(c) E^T is the covariance of x
(eq. 6). This module projects both states onto the principal coordinates x E, where the same map is diagonal.
The two forms differ by the rotation E. A rotation changes no eigenvalue, singular value, resolvent norm, residual or
Frobenius norm, so every reported number is the ZCA one. No matrix square root is formed. A truncated E is (D, R).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ABSENT = 1e-6
"""Smallest standard deviation of a present direction, as a share of the largest one.

Below it a float32 direction is rounding error: float32 has a relative precision of 1.2e-7. Chosen by hand.
"""

KRYLOV_DEPTH = 6
"""Powers of x^T x in the Krylov space. Chosen by hand."""
_EXACT_SHARE = 1.25
"""Largest smaller side, min(N, D), with an exact basis, as a multiple of the size of the Krylov space; measured."""
_NOISE = 32.0
"""Rounding error of a centred constant, in machine epsilons of its magnitude. Chosen by hand."""
_SAFE = (1e-9, 1e9)
"""Largest magnitudes between which a state keeps its unit: float32 squares then neither overflow nor vanish."""


class NonFiniteError(ValueError):
    """State with NaN or infinite values; only finite states have a spectrum."""


@dataclass(frozen=True, slots=True)
class Coordinates:
    """L transitions in the K principal coordinates that each x has, in float64 and in the unit of its centred x."""

    layers: tuple[int, ...]
    """Places of the L transitions in their batch, ascending."""
    x: Tensor
    """(L, N, K): centred inputs."""
    y: Tensor
    """(L, N, K): centred outputs, in the unit of x."""
    spread: Tensor
    """(L, K), descending: norms of the columns of x."""
    ridge: Tensor
    """(L,): eps of eq. 6 in the squared unit of x."""


@dataclass(frozen=True, slots=True)
class Centred:
    """S states minus their means over the samples."""

    values: Tensor
    """(S, N, D), divided by `unit`."""
    unit: Tensor
    """(S,), float64: divisor of each state, 1 in the safe range, else the largest magnitude."""
    noise: Tensor
    """(S,), float64: bound on the rounding error of one centred value, in the same unit."""

    def part(self, which: slice) -> Centred:
        """Return some of the states, as views."""
        return Centred(self.values[which], self.unit[which], self.noise[which])


def ends(*, paired: bool) -> tuple[slice, slice]:
    """Return the places of the inputs and of the outputs of all transitions: neighbours, or each pair if `paired`."""
    return (slice(0, None, 2), slice(1, None, 2)) if paired else (slice(0, -1), slice(1, None))


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


def largest_magnitudes(states: Sequence[Tensor], names: Sequence[str]) -> list[float]:
    """Compute the largest magnitude in each state; 0 for an empty one. It waits for the device once.

    Raises:
        NonFiniteError: a value is not finite; the message holds its name.
    """
    if not states[0].numel():
        return [0.0] * len(states)
    # aminmax passes NaN on and needs no copy of the size of the state, unlike abs().
    low, high = (torch.stack(each) for each in zip(*map(torch.aminmax, states), strict=True))
    found: list[float] = torch.maximum(-low, high).tolist()
    for magnitude, name in zip(found, names, strict=True):
        if not math.isfinite(magnitude):
            raise NonFiniteError(f"{name} holds NaN or infinite values; only finite states have a spectrum")
    return found


def in_safe_range(magnitude: float) -> bool:
    """Return True if squares of a state of that largest magnitude neither overflow nor vanish in float32."""
    return _SAFE[0] < magnitude < _SAFE[1] or magnitude == 0.0


def centre(states: Tensor, magnitudes: Sequence[float], dtype: torch.dtype) -> Centred:
    """Centre `states` (S, N, D) over their samples in `dtype`.

    A state whose magnitude lies outside the safe range is divided by it first, so that squares do not overflow.
    """
    units = [1.0 if in_safe_range(each) else each for each in magnitudes]
    unit, magnitude = torch.tensor([units, magnitudes], dtype=torch.float64, device=states.device)
    values = states.to(dtype)
    if any(each != 1.0 for each in units):  # a division by 1 would cost a copy
        values = values / unit.to(dtype)[:, None, None]
    return Centred(values - values.mean(dim=1, keepdim=True), unit, _NOISE * torch.finfo(dtype).eps * magnitude / unit)


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
    *leading, num_samples, width = x.shape
    x = x.reshape(-1, num_samples, width)
    smaller = min(num_samples, width)
    rank = min(svd_rank, smaller)
    # A block has half as many columns as the rank, and at least 8, so the Krylov space exceeds the rank by far. Both
    # numbers were chosen by hand.
    block = max(8, (rank + 1) // 2)
    # The Krylov method solves an eigenproblem of (depth + 1) * block columns, and multiplies more often.
    if smaller > _EXACT_SHARE * (KRYLOV_DEPTH + 1) * block:
        directions, coordinates = _krylov_coordinates(x, rank, block, seed)
    else:
        directions, coordinates = _exact_coordinates(x.to(gram_dtype), rank)
    return directions.to(x.dtype).view(*leading, width, rank), coordinates.double().view(*leading, num_samples, rank)


def _exact_coordinates(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the leading right singular vectors (L, D, rank) of x (L, N, D) and x in them (L, N, rank)."""
    # eigh sorts ascending: the last columns, flipped, are the leading ones. The smaller of the two Gram matrices
    # decides the cost. From left singular vectors, x^T gives the right ones up to their norms, and QR normalises them.
    if x.shape[1] >= x.shape[2]:
        directions = torch.linalg.eigh(torch.bmm(x.mT, x)).eigenvectors[..., -rank:].flip(-1)
    else:
        samples = torch.linalg.eigh(torch.bmm(x, x.mT)).eigenvectors[..., -rank:].flip(-1)
        directions = torch.linalg.qr(torch.bmm(x.mT, samples)).Q
    return directions, torch.bmm(x, directions)


def _krylov_coordinates(x: Tensor, rank: int, block: int, seed: int) -> tuple[Tensor, Tensor]:
    """Compute the Ritz vectors of x^T x in span{Z, (x^T x) Z, ..., (x^T x)^depth Z}, Z (D, block) random.

    The source is Musco and Musco, arXiv 1504.05477. The span holds all polynomials in x^T x up to degree
    `KRYLOV_DEPTH` applied to Z, where a power iteration holds one. Many narrow blocks therefore converge faster than
    one wide block where the spectrum decays slowly.

    Args:
        x: (L, N, D).
        rank: number of Ritz vectors.
        block: columns of Z.
        seed: seed of Z, which all of the batch share.

    Returns:
        The basis (L, D, rank), and x in it (L, N, rank).
    """
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(x.shape[-1], block, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    # Vectors are rows here: products with the whole x then read it in the order of its memory, in half the time.
    following = torch.linalg.qr(probes).Q.mT.expand(len(x), -1, -1)
    basis, image = following, torch.bmm(following, x.mT)
    images = [image]
    for _ in range(KRYLOV_DEPTH):
        following = torch.bmm(image, x)
        # One projection loses digits when one direction dominates: the new block then lies almost in the span. QR
        # completes a block without full rank by any vectors, also by some in the span, so a projection follows it too.
        for num_projections in (2, 1):
            for _ in range(num_projections):
                following = torch.baddbmm(following, torch.bmm(following, basis.mT), basis, alpha=-1.0)
            following = torch.linalg.qr(following.mT).Q.mT
        basis, image = torch.cat((basis, following), dim=1), torch.bmm(following, x.mT)
        images.append(image)
    # Rayleigh-Ritz: the eigenvectors of (x Q)^T (x Q) are the best approximations inside the span of Q.
    single = torch.cat(images, dim=1)
    double = single.double()
    ritz = torch.linalg.eigh(torch.bmm(double, double.mT)).eigenvectors[..., -rank:].flip(-1).to(x.dtype)
    return torch.bmm(basis.mT, ritz), torch.bmm(single.mT, ritz)


def coordinates(x: Centred, y: Centred, svd_rank: int, ridge: float, seed: int) -> Iterator[Coordinates]:
    """Project a batch of transitions onto the directions that each x has.

    It waits for the device once. x without spread, or with fewer than 2 samples, has no directions: K = 0.

    Args:
        x: inputs of L transitions.
        y: their outputs.
        svd_rank: number of directions asked for, from 1 to D.
        ridge: eps of eq. 6, at least 0, in the squared unit of the states.
        seed: seed of the randomised SVD.

    Yields:
        The transitions with equal numbers of directions, in float64.
    """
    num_layers, num_samples, _ = x.values.shape
    if num_samples < 2:
        nothing = torch.zeros(num_layers, num_samples, 0, dtype=torch.float64, device=x.values.device)
        yield Coordinates(tuple(range(num_layers)), nothing, nothing, nothing.new_zeros(num_layers, 0), x.unit)
        return
    directions, x_LNR = principal_coordinates(x.values, svd_rank, seed)
    spread = torch.linalg.vector_norm(x_LNR, dim=1)
    largest = spread.amax(1, keepdim=True)
    # cumprod keeps the leading run of present directions. Centring removes one degree of freedom of the N samples.
    present = (spread > ABSENT * largest).cumprod(1).sum(1).clamp_max(num_samples - 1)
    # N values with an error of at most `noise` each have a norm of at most noise * sqrt(N).
    counts: list[int] = torch.where(largest[:, 0] > x.noise * num_samples**0.5, present, 0).tolist()
    # x and y may have different units. y is converted to the unit of x, and the ridge of a variance to its square.
    y_LNR = torch.bmm(y.values, directions).double() * (y.unit / x.unit)[:, None, None]
    ridges = ridge / x.unit / x.unit
    for count in sorted(set(counts)):
        layers = [place for place, each in enumerate(counts) if each == count]
        rows: list[int] | slice = layers if len(layers) < num_layers else slice(None)  # a slice copies nothing
        yield Coordinates(
            tuple(layers), x_LNR[rows, :, :count], y_LNR[rows, :, :count], spread[rows, :count], ridges[rows]
        )
