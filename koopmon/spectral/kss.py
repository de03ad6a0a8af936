"""Koopman Spectral Shaping (arXiv 2602.22988, eqs. 14-15): the differentiable loss and its closed-form gradient.

Rows are samples: x and y have the shape (..., N, D). A constant orthonormal basis (..., D, R) holds the operator.
x_r = x_c basis and y_r = y_c basis are the centred states in it; C_xx and C_yx are their covariances.
With S = C_xx + ridge mean(diag C_xx) I = L L^T, the operator is

    A = L^{-1} C_yx L^{-T}.

A is similar to the ridged regression C_yx S^{-1} and equals the operator whitened by S^{-1/2} up to a rotation.
It has the eigenvalues of both and the eigenvector condition number of the latter. One Cholesky factor gives it.
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
"""Largest eigenvector condition number with a gradient. Above it `kss_gradient` returns zeros. Chosen by hand."""

_INVERSE_GUARD = 1e-6
"""Largest entry of |V^{-1} V - I| with a gradient. A larger error marks an unusable inverse. Chosen by hand."""


class KssGradient(NamedTuple):
    """Loss and gradients of a batch of transitions; exactly zero where `ok` is False."""

    loss: Tensor
    """(...), float64, at least 0."""
    grad_x: Tensor
    """(..., N, D), in the dtype of x."""
    grad_y: Tensor
    """(..., N, D), in the dtype of y."""
    ok: Tensor
    """(...), bool: the transition has a usable gradient."""


def kss_basis(x: Tensor, svd_rank: int = 32, seed: int = 0) -> Tensor:
    """Compute the constant orthonormal basis of the leading directions of centred x.

    Args:
        x: (..., N, D). A non-finite value counts as 0 and raises nothing.
        svd_rank: number of directions asked for, at least 1. The default 32 is the paper's.
        seed: seed of the private generator of the randomised SVD. Equal seeds give equal results.

    Returns:
        (..., D, R) with R = min(svd_rank, D, N): float64 for float64 input, float32 otherwise.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        finite = torch.nan_to_num(x.to(dtype), nan=0.0, posinf=0.0, neginf=0.0)
        # Division by the largest magnitude keeps squares from overflow. It leaves the directions unchanged.
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
    """Compute L_KSS of one transition (eqs. 14-15); autograd differentiates it in x and y.

    The gradient runs through the regression, the whitening and the ridge, and not through the basis.

    Args:
        x: (N, D), finite: input states.
        y: (N, D), finite: output states of the same tokens.
        svd_rank: number of directions of the basis, at least 1; unused with `basis`. The default 32 is the paper's.
        basis: (D, R), a constant of the loss; None takes `kss_basis(x, svd_rank)`.
        temperature: sharpness T of the sigmoids, per unit of modulus. The default 20 is the paper's.
        tau_u: modulus above which a mode is unstable. The default 1.05 is the paper's.
        tau_l: modulus above which a mode counts as near-unit, up to tau_u. The default 0.90 is the paper's.
        gamma: target of the soft near-unit mass, in [0, 1]. The paper has 0.3 to 0.5.
        beta: weight of the near-unit term, at least 0.
        ridge: ridge of the regression and of the whitening, relative to the mean variance in the basis. The default
            1e-3 was chosen by hand: it bounds the gradients of weak directions.

    Returns:
        A scalar: float64 for float64 x, float32 otherwise.

    Raises:
        ValueError: x or y is not finite, or x has no spread in the basis.
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
    """Compute the loss and the gradients of `kss_loss` in closed form, batched and without autograd.

    First-order perturbation gives the gradient: d lambda = u* dA v / (u* v). Only the decompositions wait for the
    device.

    Args:
        x: (..., N, D): input states.
        y: (..., N, D): output states of the same tokens.
        basis: (..., D, R): orthonormal columns, as `kss_basis` gives them.
        temperature, tau_u, tau_l, gamma, beta, ridge: as in `kss_loss`.

    Returns:
        Loss and gradients. They are zero and `ok` is False for a transition without a usable gradient: a state is not
        finite or has no spread, the eigenvector condition number exceeds `CONDITION_GUARD`, or V^{-1} V differs from I.
        Such values raise no error.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        x_r, y_r = _coordinates(x, basis), _coordinates(y, basis)
        c_xx, c_yx = _covariances(x_r, y_r)
        identity = torch.eye(c_xx.shape[-1], dtype=c_xx.dtype, device=c_xx.device)
        # Each guard puts the identity in place of a bad matrix. The decompositions then never see NaN, and one bad
        # layer leaves the others of the batch unharmed.
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
        # d|lambda| = Re(conj(lambda) d lambda) / |lambda|. The floor covers lambda = 0, where the numerator is 0 too.
        weight = slope * eigenvalues.conj() / modulus.clamp_min(torch.finfo(modulus.dtype).tiny)
        # S is constant in this term: A = L^{-1} C_yx L^{-T} gives the gradient L^{-T} G L^{-1} of C_yx, G that of A.
        on_yx = _from_both_sides(factor, _rotated_back(vectors, weight, inverse))
        # The eigenvalues of A are those of C_yx S^{-1}, and d(S^{-1}) = -S^{-1} dS S^{-1}. The derivative supplies the
        # minus sign and the additional factor lambda.
        on_ridged = -_from_both_sides(factor, _rotated_back(vectors, weight * eigenvalues, inverse))
        # S = C_xx + ridge mean(diag C_xx) I: the diagonal of C_xx also receives ridge times the mean of the gradient's
        # diagonal. C_xx = x_r^T x_r / count holds x_r twice, so the gradient of x_r takes G + G^T.
        mean = on_ridged.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        on_xx = on_ridged + on_ridged.mT + 2.0 * ridge * mean * identity
        count = _degrees_of_freedom(x)
        # C_yx = y_r^T x_r / count. x_r and y_r are centred, so these gradients have zero column means already. The
        # gradient of the centring would subtract that mean and is left out.
        lift = basis.to(product_dtype(x)).mT
        grad_x = (((y_r @ on_yx + x_r @ on_xx) / count).to(lift.dtype) @ lift).to(x.dtype)
        grad_y = ((x_r @ on_yx.mT / count).to(lift.dtype) @ lift).to(y.dtype)
        # One sum of everything is finite only if all of it is: it finds overflow in the products and in the cast.
        total = grad_x.sum((-1, -2), dtype=torch.float32) + grad_y.sum((-1, -2), dtype=torch.float32) + loss
        ok = ok & torch.isfinite(total)
        return KssGradient(torch.where(ok, loss, 0.0), _where(ok, grad_x, 0.0), _where(ok, grad_y, 0.0), ok)


def _where(ok: Tensor, values: Tensor, otherwise: Tensor | float) -> Tensor:
    """Select `values` (..., A, B) of the batch entries that are `ok` (...), and `otherwise` for the rest."""
    return torch.where(ok[..., None, None], values, otherwise)


def _all_finite(values: Tensor) -> Tensor:
    return torch.isfinite(values).all(-1).all(-1)


def _degrees_of_freedom(x: Tensor) -> int:
    return max(x.shape[-2] - 1, 1)


def _coordinates(state: Tensor, basis: Tensor) -> Tensor:
    """Centre the state (..., N, D) over its samples and project it: (..., N, R), float64."""
    # Centring removes the affine part, so A describes deviations from the mean, as in eq. 6. The large product takes
    # the cheaper dtype; float64 starts with the small matrices, whose accuracy decides that of the eigenvalues.
    state = state.to(product_dtype(state))
    return ((state - state.mean(-2, keepdim=True)) @ basis.to(state.dtype)).double()


def _covariances(x_r: Tensor, y_r: Tensor) -> tuple[Tensor, Tensor]:
    count = _degrees_of_freedom(x_r)
    return x_r.mT @ x_r / count, y_r.mT @ x_r / count


def _ridged(c_xx: Tensor, ridge: float) -> Tensor:
    diagonal = c_xx.diagonal(dim1=-2, dim2=-1)
    return c_xx + torch.diag_embed(ridge * diagonal.mean(-1, keepdim=True).expand_as(diagonal))


def _whitened(factor: Tensor, c_yx: Tensor) -> Tensor:
    """Compute A = L^{-1} C_yx L^{-T} by two triangular solves, without an inverse of L."""
    half = torch.linalg.solve_triangular(factor, c_yx, upper=False)
    operator: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True, left=False)
    return operator


def _from_both_sides(factor: Tensor, middle: Tensor) -> Tensor:
    """Compute L^{-T} M L^{-1}, the gradient with respect to C_yx, from the gradient M with respect to A."""
    half = torch.linalg.solve_triangular(factor.mT, middle, upper=True)
    gradient: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
    return gradient


def _rotated_back(vectors: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Compute the gradient with respect to A, Re(V diag(w) V^{-1})^T, from the weights w_j = d loss / d lambda_j.

    d lambda_j = u_j* dA v_j, where u_j* is row j of V^{-1}, so that u_j* v_j = 1. The sum over j is
    d loss = Re tr(V diag(w) V^{-1} dA). The transpose turns the trace into an entrywise gradient.
    """
    return ((vectors * weight[..., None, :]) @ inverse).real.mT


def _eig(operator: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute eigenvalues (..., R), eigenvectors (..., R, R) and a flag (...) for convergence.

    LAPACK's iteration may fail to converge. The whole batch then gets those of the identity and the flag False.
    """
    solved = torch.ones(operator.shape[:-2], dtype=torch.bool, device=operator.device)
    try:
        eigenvalues, vectors = torch.linalg.eig(operator)
    except RuntimeError:
        operator = torch.eye(operator.shape[-1], dtype=operator.dtype, device=operator.device).expand_as(operator)
        eigenvalues, vectors = torch.linalg.eig(operator)
        solved = torch.zeros_like(solved)
    return eigenvalues, vectors, solved


def _trustworthy(eigenvalues: Tensor, vectors: Tensor, inverse: Tensor) -> Tensor:
    """Flag (...) the operators whose eigenvectors give a usable gradient: invertible and well conditioned."""
    identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype, device=vectors.device)
    inverted: Tensor = (inverse @ vectors - identity).abs().amax((-1, -2)) < _INVERSE_GUARD
    real = real_eigenvectors(eigenvalues, vectors)
    real = _where(inverted, real, identity.real)
    # The eigenvalues of W^T W are the squared singular values of W. Squaring loses digits only far beyond the guard.
    squares: Tensor = torch.linalg.eigvalsh(real.mT @ real)
    return inverted & (squares[..., -1] < CONDITION_GUARD**2 * squares[..., 0])


def _penalty(
    modulus: Tensor, temperature: float, tau_u: float, tau_l: float, gamma: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Compute L_KSS (...) of the moduli (..., R), eqs. 14-15, and its derivative in each modulus (..., R)."""
    excess = modulus - tau_u
    gate, growth = torch.sigmoid(temperature * excess), softplus(excess)
    above, below = torch.sigmoid(temperature * (modulus - tau_l)), torch.sigmoid(-temperature * excess)
    surplus = (above * below).mean(-1) - gamma
    # The two sigmoids are a soft indicator of tau_l < |lambda| < tau_u, so their mean is a soft near-unit mass.
    loss = (gate * growth.square()).sum(-1) + beta * surplus.square()
    # The product rule gives both derivatives, with sigmoid' = T sigmoid (1 - sigmoid) and softplus' = sigmoid.
    unstable = temperature * gate * (1.0 - gate) * growth.square() + 2.0 * gate * growth * torch.sigmoid(excess)
    # d(above below) = T above below ((1 - above) - (1 - below)) = T above below (below - above). The mean divides by R.
    near_unit = temperature * above * below * (below - above) / modulus.shape[-1]
    return loss, unstable + 2.0 * beta * surplus[..., None] * near_unit
