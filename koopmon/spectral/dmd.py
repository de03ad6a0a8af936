"""Whitened dynamic mode decomposition of layer transitions, batched over layers (arXiv 2602.22988, eqs. 6-10)."""

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
    """Whitened operators of a batch of L transitions with R directions each, in float64 or complex128."""

    operator: Tensor
    """(L, R, R), float64: A of y_w ~ x_w A^T. It is the identity where `finite` is False."""
    eigenvalues: Tensor
    """(L, R), complex128, by descending modulus, then by descending real part."""
    vectors: Tensor
    """(L, R, R), complex128: unit right eigenvectors V in the columns."""
    residuals: Tensor
    """(L, R): r_j of eq. 10, at least 0; infinity where it is not defined."""
    condition: Tensor
    """(L,): condition number kappa_2(V), at least 1."""
    nonlinearity: Tensor
    """(L,): eta of eq. 5, at least 0."""
    update: Tensor
    """(L,): update ratio ||y_w - x_w||_F / ||x_w||_F, at least 0."""
    finite: Tensor
    """(L,), bool: False where values overflowed. The other fields of that layer have no meaning then."""


def fit(x: Tensor, y: Tensor, spread: Tensor, ridge: Tensor) -> Operators:
    """Fit the whitened operator A of each transition (eqs. 6-9) and measure it (eqs. 5 and 10).

    The regression has no ridge. The ridge enters the whitening map only.

    Args:
        x: (L, N, R), N >= 2: centred inputs in their principal coordinates. The columns are orthogonal up to rounding.
        y: (L, N, R): centred outputs in the same coordinates.
        spread: (L, R), positive: norms of the columns of x.
        ridge: (L,), at least 0: eps of eq. 6, in the squared unit of x.

    Returns:
        The operators. Overflow sets `finite` to False for its layer and raises nothing.
    """
    x, y = x.double(), y.double()
    # Principal coordinates make Sigma of eq. 6 diagonal. Whitening then scales column i by
    # g_i = 1 / sqrt(s_i^2 / (N - 1) + eps). N - 1 is the divisor of a sample covariance, as in eq. 6.
    gain = torch.rsqrt(spread.square() / (x.shape[-2] - 1) + ridge[:, None])
    whitened = spread * gain  # norms of the columns of x_w
    # C solves the least-squares problem y ~ x C. Columns of unit norm have a Gram matrix close to I, and its Cholesky
    # solve is well conditioned. The errors then grow with the condition number of x; x^T x itself would square it.
    gram = _scaled(torch.bmm(x.mT, x), 1.0 / spread, 1.0 / spread)
    factor = torch.linalg.cholesky_ex(gram).L
    coefficients = torch.cholesky_solve(torch.bmm(x.mT, y) / spread[:, :, None], factor)  # diag(s) C
    # With y_w = y diag(g) and x_w = x diag(g), y ~ x C becomes y_w ~ x_w diag(1/g) C diag(g).
    # So A^T = diag(1/g) C diag(g), and the final transpose gives A. The rows are divided by s g, because
    # `coefficients` still holds the factor s.
    operator = _scaled(coefficients, 1.0 / whitened, gain).mT
    # E = y - x C is formed from the states. A difference of Gram matrices would cancel for nearly linear layers.
    error = torch.baddbmm(y, x, coefficients / spread[:, :, None], alpha=-1.0)
    error_gram = _scaled(torch.bmm(error.mT, error), gain, gain)  # E_w^T E_w
    # ||y_w - x_w||_F: whitening is diagonal, so it scales the squared norm of each column by g^2.
    change = ((y - x).square_().sum(-2) * gain.square()).sum(-1).sqrt()
    # LAPACK may crash the process on NaN, so eig receives the identity in place of an operator that overflowed.
    finite = torch.isfinite(operator).all((-1, -2)) & torch.isfinite(error_gram).all((-1, -2))
    identity = torch.eye(operator.shape[-1], dtype=operator.dtype, device=operator.device)
    operator = torch.where(finite[:, None, None], operator, identity)
    eigenvalues, vectors = sorted_eig(operator)
    real_vectors = real_eigenvectors(eigenvalues, vectors)
    # The rows of V^-1 are the left eigenvectors. The real form holds their real and imaginary parts.
    left = inverses(real_vectors)
    return Operators(
        operator=operator,
        eigenvalues=eigenvalues,
        vectors=vectors,
        residuals=_residuals(eigenvalues, left, error_gram, _scaled(gram, whitened, whitened)),
        condition=condition_number(real_vectors),
        # The trace of E_w^T E_w is ||E_w||_F^2, the squared numerator of eq. 5.
        nonlinearity=error_gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt() / (change + EPSILON),
        update=change / torch.linalg.vector_norm(whitened, dim=-1),
        finite=finite,
    )


def _scaled(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute diag(rows) M diag(columns) for M (..., R, R), rows and columns (..., R)."""
    return rows[..., :, None] * matrix * columns[..., None, :]


def sorted_eig(operator: Tensor) -> tuple[Tensor, Tensor]:
    """Compute eigenvalues and eigenvectors by descending modulus, then by descending real part.

    Args:
        operator: (..., R, R), real and finite.

    Returns:
        Eigenvalues (..., R) and unit right eigenvectors (..., R, R), complex. The two values of a conjugate pair are
        adjacent; the one with the positive imaginary part is first.
    """
    eigenvalues, vectors = torch.linalg.eig(operator)
    # Two stable sorts apply the secondary key first. LAPACK returns a conjugate pair in the order (+, -). Both values
    # have equal keys, so stable sorts keep that order.
    by_real = eigenvalues.real.argsort(dim=-1, descending=True, stable=True)
    by_modulus = eigenvalues.gather(-1, by_real).abs().argsort(dim=-1, descending=True, stable=True)
    order = by_real.gather(-1, by_modulus)
    return eigenvalues.gather(-1, order), vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))


def _residuals(eigenvalues: Tensor, left: Tensor, error_gram: Tensor, signal_gram: Tensor) -> Tensor:
    """Compute r_j = ||u_j*(Y - lambda_j X)|| / (||u_j* X|| + eps) of eq. 10.

    X and Y are the whitened states (R, N). u_j is the unit left eigenvector.

    Args:
        eigenvalues: (L, R), with adjacent conjugate pairs.
        left: (L, R, R): real and imaginary parts of the left eigenvectors in the rows, not normalised.
        error_gram: (L, R, R): E E^T of the regression error E = Y - A X.
        signal_gram: (L, R, R): X X^T.

    Returns:
        (L, R), at least 0; infinity where the ratio is NaN.
    """
    # Y = A X + E and u_j* A = lambda_j u_j* give u_j*(Y - lambda_j X) = u_j* E. This form has no cancellation.
    # u* G u = Re(u)^T G Re(u) + Im(u)^T G Im(u) for a real symmetric G. The row products are the terms. The third form
    # is ||u_j||^2: the rows of an inverse are not unit vectors, so the others are divided by it.
    products = torch.stack((torch.bmm(left, error_gram), torch.bmm(left, signal_gram), left))
    error, signal, squared = _pair_sum(eigenvalues, (products * left).sum(-1))
    # Rounding can leave a quadratic form slightly below 0.
    numerator = (error / squared).clamp_min(0.0).sqrt()
    residual: Tensor = numerator / ((signal / squared).clamp_min(0.0).sqrt() + EPSILON)
    return residual.nan_to_num(nan=torch.inf)


def _pair_sum(eigenvalues: Tensor, values: Tensor) -> Tensor:
    """Add `values` (..., R) over each conjugate pair and double those of real eigenvalues.

    The rows of the real form are sqrt(2) Re u and sqrt(2) Im u up to sign. The sum of their forms is twice that of u.
    """
    # Pairs are adjacent. The partner follows a positive imaginary part and precedes a negative one.
    after, before = values.roll(-1, -1), values.roll(1, -1)
    imaginary = eigenvalues.imag
    partner = torch.where(imaginary > 0, after, torch.where(imaginary < 0, before, values))
    return values + partner
