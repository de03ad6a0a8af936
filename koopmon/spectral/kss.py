"""Koopman Spectral Shaping (eqs. 14-15): the differentiable loss and its closed-form gradient.

Rows are samples: x, y (..., N, D). The operator lives in a constant orthonormal basis (..., D, R): with x_r = x_c
basis, y_r = y_c basis, C_xx and C_yx their covariances, and S = C_xx + ridge mean(diag C_xx) I = L L^T,

    A = L^{-1} C_yx L^{-T}.

A is similar to the ridged Gram regression C_yx S^{-1}, and equal up to a rotation to the operator whitened by S^{-1/2}:
it has the eigenvalues of both and the eigenvector condition number of the latter, for one Cholesky factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from koopmon.spectral._linalg import inverses
from koopmon.spectral.nonnormality import real_eigenvectors
from koopmon.spectral.whitening import principal_coordinates, product_dtype

CONDITION_GUARD = 100.0
"""Above this eigenvector condition number eigenvalue gradients are noise, and the closed form gives zeros."""

_INVERSE_GUARD = 1e-6


class KssGradient(NamedTuple):
    """loss (...), float64; grad_x, grad_y (..., N, D) in the dtype of x and y; ok (...), bool.

    Where `ok` is False the gradients and the loss are exactly zero.
    """

    loss: Tensor
    grad_x: Tensor
    grad_y: Tensor
    ok: Tensor


def kss_basis(x: Tensor, svd_rank: int = 32, seed: int = 0) -> Tensor:
    """Constant orthonormal basis (..., D, R) of the leading directions of centred x (..., N, D).

    R = min(svd_rank, D, N); float32, or float64 for float64 input. Deterministic for `seed`. Bad values never raise:
    non-finite ones count as 0.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        finite = torch.nan_to_num(x.to(dtype), nan=0.0, posinf=0.0, neginf=0.0)
        extent = torch.maximum(finite.amax((-1, -2), keepdim=True), -finite.amin((-1, -2), keepdim=True))
        scaled = finite / torch.where(extent > 0, extent, 1.0)
        return principal_coordinates(scaled - scaled.mean(-2, keepdim=True), svd_rank, seed, gram_dtype=dtype)[0]


def kss_loss(
    x: Tensor,
    y: Tensor,
    *,
    svd_rank: int = 32,
    basis: Tensor | None = None,
    temperature: float = 20.0,
    tau_u: float = 1.05,
    tau_l: float = 0.90,
    gamma: float = 0.4,
    beta: float = 1.0,
    ridge: float = 1e-3,
) -> Tensor:
    """L_KSS of one transition x, y (N, D): a scalar, differentiable in both by autograd.

    Args:
        basis: (D, R), a constant of the loss; None takes `kss_basis(x, svd_rank)`.
        temperature: sharpness T of the sigmoids, per unit of modulus.
        tau_u, tau_l: moduli above which a mode is unstable, and between which it is near-unit.
        gamma, beta: target of the soft near-unit mass, and the weight of that term.
        ridge: of the Gram regression and the whitening alike, relative to the mean variance in the basis.

    The gradient runs through the regression, the whitening and the ridge. Raises ValueError when x or y is not finite
    or x has no spread in the basis.
    """
    for name, state in (("x", x), ("y", y)):
        if not torch.isfinite(state).all():
            raise ValueError(f"{name} holds NaN or infinite values; kss_loss needs finite states")
    basis = kss_basis(x, svd_rank) if basis is None else basis.detach()
    with torch.autocast(x.device.type, enabled=False):
        c_xx, c_yx = _covariances(_coordinates(x, basis), _coordinates(y, basis))
        factor, failed = torch.linalg.cholesky_ex(_ridged(c_xx, ridge))
        if failed.any():
            raise ValueError("x has no spread in the basis: constant samples have no operator")
        modulus = torch.linalg.eigvals(_whitened(factor, c_yx)).abs()
        loss = _penalty(modulus, temperature, tau_u, tau_l, gamma, beta)[0]
        return loss if x.dtype == torch.float64 else loss.float()


def kss_gradient(
    x: Tensor,
    y: Tensor,
    basis: Tensor,
    *,
    temperature: float = 20.0,
    tau_u: float = 1.05,
    tau_l: float = 0.90,
    gamma: float = 0.4,
    beta: float = 1.0,
    ridge: float = 1e-3,
) -> KssGradient:
    """Loss and gradients of `kss_loss` in closed form, batched: x, y (..., N, D), basis (..., D, R). No autograd.

    First-order perturbation: d lambda = u* dA v / u* v. Everything is zero and `ok` False where a state is not finite
    or has no spread, where the eigenvectors are ill-conditioned (above `CONDITION_GUARD`) or U V differs from I. Bad
    values never raise, and nothing waits for the device beyond the decompositions themselves.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x_r, y_r = _coordinates(x, basis), _coordinates(y, basis)
        c_xx, c_yx = _covariances(x_r, y_r)
        identity = torch.eye(c_xx.shape[-1], dtype=c_xx.dtype, device=c_xx.device)
        ok = _all_finite(c_xx) & _all_finite(c_yx)
        factor, failed = torch.linalg.cholesky_ex(_ridged(_where(ok, c_xx, identity), ridge))
        factor = _where(ok := ok & (failed == 0), factor, identity)
        operator = _whitened(factor, _where(ok, c_yx, identity))
        operator = _where(ok := ok & _all_finite(operator), operator, identity)
        eigenvalues, vectors, solved = _eig(operator)
        inverse = inverses(vectors)
        ok = ok & solved & _trustworthy(eigenvalues, vectors, inverse)

        modulus = eigenvalues.abs()
        loss, slope = _penalty(modulus, temperature, tau_u, tau_l, gamma, beta)
        weight = slope * eigenvalues.conj() / modulus.clamp_min(torch.finfo(modulus.dtype).tiny)
        on_yx = _from_both_sides(factor, _rotated_back(vectors, weight, inverse))
        on_ridged = -_from_both_sides(factor, _rotated_back(vectors, weight * eigenvalues, inverse))
        mean = on_ridged.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        on_xx = on_ridged + on_ridged.mT + 2.0 * ridge * mean * identity
        count = _degrees_of_freedom(x)
        lift = basis.to(product_dtype(x)).mT
        grad_x = (((y_r @ on_yx + x_r @ on_xx) / count).to(lift.dtype) @ lift).to(x.dtype)
        grad_y = ((x_r @ on_yx.mT / count).to(lift.dtype) @ lift).to(y.dtype)
        total = grad_x.sum((-1, -2), dtype=torch.float32) + grad_y.sum((-1, -2), dtype=torch.float32) + loss
        ok = ok & torch.isfinite(total)
        return KssGradient(torch.where(ok, loss, 0.0), _where(ok, grad_x, 0.0), _where(ok, grad_y, 0.0), ok)


def _where(ok: Tensor, values: Tensor, otherwise: Tensor | float) -> Tensor:
    """`values` (..., A, B) of the batch entries that are `ok` (...), else `otherwise`."""
    return torch.where(ok[..., None, None], values, otherwise)


def _all_finite(values: Tensor) -> Tensor:
    return torch.isfinite(values).all(-1).all(-1)


def _degrees_of_freedom(x: Tensor) -> int:
    return max(x.shape[-2] - 1, 1)


def _coordinates(state: Tensor, basis: Tensor) -> Tensor:
    """The centred state (..., N, D) in the basis: (..., N, R), float64, for the small matrices decide the accuracy."""
    state = state.to(product_dtype(state))
    return ((state - state.mean(-2, keepdim=True)) @ basis.to(state.dtype)).double()


def _covariances(x_r: Tensor, y_r: Tensor) -> tuple[Tensor, Tensor]:
    count = _degrees_of_freedom(x_r)
    return x_r.mT @ x_r / count, y_r.mT @ x_r / count


def _ridged(c_xx: Tensor, ridge: float) -> Tensor:
    diagonal = c_xx.diagonal(dim1=-2, dim2=-1)
    return c_xx + torch.diag_embed(ridge * diagonal.mean(-1, keepdim=True).expand_as(diagonal))


def _whitened(factor: Tensor, c_yx: Tensor) -> Tensor:
    """A = L^{-1} C_yx L^{-T}."""
    half = torch.linalg.solve_triangular(factor, c_yx, upper=False)
    operator: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True, left=False)
    return operator


def _from_both_sides(factor: Tensor, middle: Tensor) -> Tensor:
    """L^{-T} M L^{-1}: the gradient with respect to C_yx, given M with respect to A."""
    half = torch.linalg.solve_triangular(factor.mT, middle, upper=True)
    gradient: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    return gradient


def _rotated_back(vectors: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Re(V diag(w) V^{-1})^T: the gradient with respect to A, given d loss / d lambda_j = w_j."""
    return ((vectors * weight[..., None, :]) @ inverse).real.mT


def _eig(operator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors and whether they are to be had: the iteration may, very rarely, not converge."""
    solved = torch.ones(operator.shape[:-2], dtype=torch.bool, device=operator.device)
    try:
        eigenvalues, vectors = torch.linalg.eig(operator)
    except RuntimeError:
        operator = torch.eye(operator.shape[-1], dtype=operator.dtype, device=operator.device).expand_as(operator)
        eigenvalues, vectors = torch.linalg.eig(operator)
        solved = torch.zeros_like(solved)
    return eigenvalues, vectors, solved


def _trustworthy(eigenvalues: Tensor, vectors: Tensor, inverse: Tensor) -> Tensor:
    identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    inverted: Tensor = (inverse @ vectors - identity).abs().amax((-1, -2)) < _INVERSE_GUARD
    real = real_eigenvectors(eigenvalues, vectors)
    real = _where(inverted, real, identity.real)
    squares: Tensor = torch.linalg.eigvalsh(real.mT @ real)
    return inverted & (squares[..., -1] < CONDITION_GUARD**2 * squares[..., 0])


def _penalty(
    modulus: Tensor, temperature: float, tau_u: float, tau_l: float, gamma: float, beta: float
) -> tuple[Tensor, Tensor]:
    """L_KSS (...) of moduli (..., R), eqs. 14-15, and its derivative in each modulus (..., R)."""
    excess = modulus - tau_u
    gate, growth = torch.sigmoid(temperature * excess), softplus(excess)
    above, below = torch.sigmoid(temperature * (modulus - tau_l)), torch.sigmoid(-temperature * excess)
    surplus = (above * below).mean(-1) - gamma
    loss = (gate * growth.square()).sum(-1) + beta * surplus.square()
    unstable = temperature * gate * (1.0 - gate) * growth.square() + 2.0 * gate * growth * torch.sigmoid(excess)
    near_unit = temperature * above * below * (below - above) / modulus.shape[-1]
    return loss, unstable + 2.0 * beta * surplus[..., None] * near_unit
