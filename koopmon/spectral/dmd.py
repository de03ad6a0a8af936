"""Whitened dynamic mode decomposition of layer transitions, batched over layers (eqs. 6-10)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from koopmon.spectral._linalg import inverses
from koopmon.spectral.nonnormality import condition_number, real_eigenvectors

EPSILON = 1e-5
"""The paper's epsilon in the denominators of eqs. 5 and 10."""


@dataclass(frozen=True, slots=True)
class Operators:
    """Whitened operators of a batch of transitions: L layers, R directions, float64 or complex128.

    operator (L, R, R): A with y_w ~ x_w A^T. eigenvalues (L, R): by descending modulus, then real part. vectors (L, R,
    R): unit right eigenvectors. residuals (L, R): r_j of eq. 10. condition, nonlinearity, update (L,): kappa(V), eta of
    eq. 5, update ratio. finite (L,): False where values overflowed; the rest is meaningless there.
    """

    operator: Tensor
    eigenvalues: Tensor
    vectors: Tensor
    residuals: Tensor
    condition: Tensor
    nonlinearity: Tensor
    update: Tensor
    finite: Tensor


def fit(x: Tensor, y: Tensor, spread: Tensor, ridge: Tensor) -> Operators:
    """Fit A to x, y (L, N, R) in principal coordinates; spread (L, R): column norms of x; ridge (L,): eps of eq. 6.

    The regression itself has no ridge: the whitening map alone has. Columns of x are orthogonal up to rounding, and
    are made so exactly by the Cholesky factor of their Gram matrix, which is close to I: errors grow with the
    condition number of x, not with its square.
    """
    x, y = x.double(), y.double()
    gain = torch.rsqrt(spread.square() / (x.shape[-2] - 1) + ridge[:, None])
    whitened = spread * gain
    gram = _scaled(x.mT @ x, 1.0 / spread, 1.0 / spread)
    factor = torch.linalg.cholesky_ex(gram).L
    coefficients = torch.cholesky_solve(x.mT @ y / spread[:, :, None], factor)
    operator = _scaled(coefficients, 1.0 / whitened, gain).mT
    error = torch.baddbmm(y, x, coefficients / spread[:, :, None], alpha=-1.0)
    error_gram = _scaled(error.mT @ error, gain, gain)
    change = ((y - x).square_().sum(-2) * gain.square()).sum(-1).sqrt()
    finite = torch.isfinite(operator).all((-1, -2)) & torch.isfinite(error_gram).all((-1, -2))
    identity = torch.eye(operator.shape[-1], dtype=operator.dtype, device=operator.device)
    operator = torch.where(finite[:, None, None], operator, identity)
    eigenvalues, vectors = sorted_eig(operator)
    real_vectors = real_eigenvectors(eigenvalues, vectors)
    left = inverses(real_vectors)
    return Operators(
        operator=operator,
        eigenvalues=eigenvalues,
        vectors=vectors,
        residuals=_residuals(eigenvalues, left, error_gram, _scaled(gram, whitened, whitened)),
        condition=condition_number(real_vectors),
        nonlinearity=error_gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt() / (change + EPSILON),
        update=change / torch.linalg.vector_norm(whitened, dim=-1),
        finite=finite,
    )


def _scaled(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """diag(rows) M diag(columns)."""
    return rows[..., :, None] * matrix * columns[..., None, :]


def sorted_eig(operator: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., R) and unit eigenvectors (..., R, R) of finite real A, by descending modulus, then real part.

    Sorting is stable, so a conjugate pair stays together, positive imaginary part first.
    """
    eigenvalues, vectors = torch.linalg.eig(operator)
    by_real = eigenvalues.real.argsort(dim=-1, descending=True, stable=True)
    by_modulus = eigenvalues.gather(-1, by_real).abs().argsort(dim=-1, descending=True, stable=True)
    order = by_real.gather(-1, by_modulus)
    return eigenvalues.gather(-1, order), vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))


def _residuals(eigenvalues: Tensor, left: Tensor, error_gram: Tensor, signal_gram: Tensor) -> Tensor:
    """r_j = ||u_j*(Y - lambda_j X)|| / (||u_j* X|| + eps), u_j unit left eigenvectors (eq. 10).

    With Y = A X + E and u_j* A = lambda_j u_j*, the numerator is exactly ||u_j* E||: no cancellation.
    """

    def quadratic(gram: Tensor) -> Tensor:
        return _pair_mean(eigenvalues, ((left @ gram) * left).sum(-1))

    squared = _pair_mean(eigenvalues, left.square().sum(-1))
    numerator = (quadratic(error_gram) / squared).clamp_min(0.0).sqrt()
    residual = numerator / ((quadratic(signal_gram) / squared).clamp_min(0.0).sqrt() + EPSILON)
    return residual.nan_to_num(nan=torch.inf)


def _pair_mean(eigenvalues: Tensor, values: Tensor) -> Tensor:
    """Mean of `values` (..., R) over each conjugate pair: turns forms in Re u and Im u into forms in u."""
    after, before = values.roll(-1, -1), values.roll(1, -1)
    imaginary = eigenvalues.imag
    partner = torch.where(imaginary > 0, after, torch.where(imaginary < 0, before, values))
    return (values + partner) / 2
