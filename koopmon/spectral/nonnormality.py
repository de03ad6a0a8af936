"""Measures of non-normality: eigenvector condition number and Kreiss constant (arXiv 2602.22988, eq. 29)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from koopmon.spectral._linalg import inverses
from koopmon.spectral.resolvent import Resolvent

CONDITION_LIMIT = 1.0 / torch.finfo(torch.float64).eps
"""Largest reported condition number. Beyond it the operator is defective to float64 precision."""

KREISS_ACCURACY = 1e-3
"""Relative accuracy of `kreiss_constant` for values up to 1e4.

A value exceeds the supremum by rounding at most and lies at most this share below it. Tests compare it with dense
searches. Larger values are lower bounds; they belong to operators within about 1e-4 of a defective eigenvalue on the
circle.
"""

# The constants of the search below were chosen by hand. `KREISS_ACCURACY` is the bound that they must keep.
_DEFECTIVE = 1e8
"""Eigenvector condition number above which the search takes a perturbed B: V^{-1} is too inaccurate there."""
_PERTURBATION = 1e-10
"""Scale of that perturbation, relative to ||B||_F."""
_SINGLE_PRECISION = 1e4
"""Eigenvector condition number below which single precision is enough for the rough search."""

_NEAREST, _CLOSE, _FAR = 1e-6, 1e-3, 1.0
"""Bounds of |z| - 1: the search starts at the first, takes all angles from the second, and few from the third."""
_LEVEL_STEP = 2.0
"""Largest step of log(|z| - 1) between two levels of a coarse search."""

_MAX_ANGLES = 64
"""Largest number of angles of the near search, beside 0 and pi."""
_NUM_DANGEROUS = 8
"""Number of eigenvalues, largest modulus first, whose angles the close search takes."""
_NUM_FAR_ANGLES = 5
"""Number of evenly spaced angles of the far search."""
_NUM_NEAR, _NUM_CLOSE, _NUM_FAR = 5, 1, 2
"""Numbers of points that the three coarse searches pass on."""
_NUM_FINE = 2
"""Number of points that the rough refinement passes on to the fine one."""
_ROUGH_ROUNDS, _FINE_ROUNDS = 3, 6
"""Rounds of refinement."""
_SHRINK = 0.55
"""Ratio of the steps of two rounds. A value above 1/2 lets the next round reach past the midpoint of two points."""
_BATCH_ELEMENTS = 1 << 21
"""Bound on the elements of the resolvent vectors (L, R, P) of one batch, which limits the memory."""


def real_eigenvectors(eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    """Convert the eigenvectors V of real operators to a real matrix W = V Q*, with Q unitary.

    V and W have the same singular values. The rows of W^{-1} are real and imaginary parts of the left eigenvectors, up
    to sign and a factor sqrt(2). Real arithmetic takes about a quarter of the complex multiplications.

    Args:
        eigenvalues: (..., R), with adjacent conjugate pairs, positive imaginary part first.
        eigenvectors: (..., R, R), complex.

    Returns:
        W, (..., R, R), real. A conjugate pair becomes the columns sqrt(2) Re v and sqrt(2) Im v.
    """
    # The pair v, conj(v) has (v + conj(v)) / sqrt(2) = sqrt(2) Re v; the factor sqrt(2) makes Q unitary.
    # The second vector of a pair is conj(v), so its column is -sqrt(2) Im v. The sign changes no singular value.
    imaginary = eigenvalues.imag.unsqueeze(-2)
    pair = math.sqrt(2.0) * torch.where(imaginary > 0, eigenvectors.real, eigenvectors.imag)
    return torch.where(imaginary == 0, eigenvectors.real, pair)


def condition_number(vectors: Tensor) -> Tensor:
    """Compute kappa_2 = sigma_max / sigma_min (...) of matrices (..., R, R), at most `CONDITION_LIMIT`."""
    values = torch.linalg.svdvals(vectors)
    ratio: Tensor = values[..., 0] / values[..., -1]
    return ratio.nan_to_num(nan=CONDITION_LIMIT, posinf=CONDITION_LIMIT).clamp_max(CONDITION_LIMIT)


def kreiss_constant(operator: Tensor, eigen: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Compute the Kreiss constant K = sup over |z| > 1 of (|z| - 1) ||(zI - B)^{-1}||_2 (arXiv 2602.22988, eq. 29).

    B is A / max(1, rho), because K of A is infinite for rho > 1. The search covers |z| >= 1 + 1e-6. An operator with a
    defective eigenvalue on the unit circle therefore has a large finite value. The search finds z only. The value comes
    from an SVD of zI - B at that point. `KREISS_ACCURACY` is its accuracy.

    Args:
        operator: A, (..., R, R), real and finite.
        eigen: eigenvalues (..., R) and unit eigenvectors (..., R, R) of A; None computes them.

    Returns:
        K, (...), float64, at least 1. It is 1 for normal operators.

    Raises:
        ValueError: A is not finite.
    """
    if not torch.isfinite(operator).all():
        raise ValueError("operator holds NaN or infinite values; only finite operators have a Kreiss constant")
    size = operator.shape[-1]
    matrices = operator.double().reshape(-1, size, size)
    eigenvalues, vectors = torch.linalg.eig(matrices) if eigen is None else eigen
    eigenvalues, vectors = eigenvalues.reshape(-1, size), vectors.reshape(-1, size, size)
    # 16 points for each angle is the allowance of a batch, chosen by hand.
    chunk = max(1, _BATCH_ELEMENTS // (size * 16 * min(size, _MAX_ANGLES)))
    parts = [slice(first, first + chunk) for first in range(0, len(matrices), chunk)]
    found = [_kreiss(matrices[part], eigenvalues[part], vectors[part]) for part in parts]
    return torch.cat(found).reshape(operator.shape[:-2])


def _resolvents(matrices: Tensor, eigenvalues: Tensor, vectors: Tensor) -> tuple[Resolvent, Resolvent]:
    """Build the resolvents of B for the fine and the rough search.

    The rough one has single precision where that is enough. A condition number above `_DEFECTIVE` makes V^{-1}
    unusable. Both resolvents then belong to B plus a small perturbation, which separates the eigenvalues.
    """
    condition = condition_number(real_eigenvectors(eigenvalues, vectors))
    if (condition > _DEFECTIVE).any():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(matrices.shape[1:], generator=generator, dtype=torch.float64, device="cpu").to(
            matrices.device
        )
        size = torch.linalg.matrix_norm(matrices, keepdim=True) * (condition > _DEFECTIVE)[:, None, None]
        eigenvalues, vectors = torch.linalg.eig(matrices + _PERTURBATION * size * noise)
    inverse = inverses(vectors)
    rough = torch.complex64 if condition.max() < _SINGLE_PRECISION else torch.complex128
    return Resolvent(eigenvalues, vectors, inverse), Resolvent(eigenvalues, vectors.to(rough), inverse.to(rough))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """S points z = (1 + exp(log_gap)) exp(i angle) for each of L operators, and the next step lengths.

    value, log_gap, angle and angle_step have the shape (L, S). vector (L, R, S) holds the last Lanczos vectors.
    """

    value: Tensor
    log_gap: Tensor
    angle: Tensor
    vector: Tensor
    gap_step: float
    angle_step: Tensor

    def best(self, merit: Tensor, count: int) -> _Search:
        """Keep the `count` points of largest merit (L, S)."""
        keep = merit.topk(min(count, merit.shape[1]), dim=-1).indices
        return _Search(
            value=self.value.gather(1, keep),
            log_gap=self.log_gap.gather(1, keep),
            angle=self.angle.gather(1, keep),
            vector=_columns(self.vector, keep),
            gap_step=self.gap_step,
            angle_step=self.angle_step.gather(1, keep),
        )

    def join(self, other: _Search) -> _Search:
        """Join the points of two searches with equal gap steps."""
        return _Search(
            value=torch.cat((self.value, other.value), -1),
            log_gap=torch.cat((self.log_gap, other.log_gap), -1),
            angle=torch.cat((self.angle, other.angle), -1),
            vector=torch.cat((self.vector, other.vector), -1),
            gap_step=self.gap_step,
            angle_step=torch.cat((self.angle_step, other.angle_step), -1),
        )


def _kreiss(matrices: Tensor, eigenvalues: Tensor, vectors: Tensor) -> Tensor:
    """Compute `kreiss_constant` of a batch (L, R, R)."""
    # B = A / max(1, rho): the scale changes the eigenvalues and leaves the eigenvectors.
    scale = eigenvalues.abs().amax(-1).clamp_min(1.0)
    matrices = matrices / scale[:, None, None]
    resolvent, rough = _resolvents(matrices, eigenvalues / scale[:, None], vectors)
    search = _scan_near(rough).join(_scan_close(rough)).join(_scan_far(rough, matrices))
    for _ in range(_ROUGH_ROUNDS):
        search = _refine(rough, search)
    search = search.best(search.value, _NUM_FINE)
    for _ in range(_FINE_ROUNDS):
        search = _refine(resolvent, search)
    search = search.best(search.value, 1)
    gap = search.log_gap[:, 0].exp()
    point = torch.polar(1 + gap, search.angle[:, 0])
    identity = torch.eye(matrices.shape[-1], dtype=point.dtype, device=point.device)
    # ||(zI - B)^{-1}||_2 = 1 / sigma_min(zI - B). This SVD uses no eigenvectors, so their error changes z only.
    smallest: Tensor = torch.linalg.svdvals(point[:, None, None] * identity - matrices)[:, -1]
    # |z| to infinity gives the value 1, so the supremum is at least 1.
    return (gap / smallest).nan_to_num(nan=1.0, posinf=1.0 / _NEAREST).clamp_min(1.0)


def _refine(resolvent: Resolvent, search: _Search) -> _Search:
    """Move every point to the best of itself and its eight neighbours, and shrink the steps."""
    moves = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64, device=search.angle.device)
    gap_moves, angle_moves = (part.reshape(-1) for part in torch.meshgrid(moves, moves, indexing="ij"))
    around = gap_moves.numel()
    gaps = (search.log_gap[..., None] + search.gap_step * gap_moves).clamp_min(math.log(_NEAREST))
    angles = search.angle[..., None] + search.angle_step[..., None] * angle_moves
    points = torch.polar(1 + gaps.exp(), angles).flatten(1)
    start = search.vector.to(resolvent.vectors.dtype)
    norms, reached = resolvent.norm(points, start.repeat_interleave(around, dim=-1))
    value, best = (gaps.exp() * norms.reshape(gaps.shape)).max(-1)
    column = best + around * torch.arange(best.shape[1], device=best.device)
    return _Search(
        value=value,
        log_gap=gaps.gather(-1, best[..., None])[..., 0],
        angle=angles.gather(-1, best[..., None])[..., 0],
        vector=_columns(reached, column),
        gap_step=_SHRINK * search.gap_step,
        angle_step=_SHRINK * search.angle_step,
    )


def _scan_near(resolvent: Resolvent) -> _Search:
    """Search all angles for |z| - 1 from `_CLOSE` to `_FAR`; keep local maxima over the angle before other points."""
    angles = _angles(resolvent.eigenvalues)
    search = _crests(resolvent, _levels(_CLOSE, _FAR, angles.device), angles)
    padded = torch.nn.functional.pad(search.value, (1, 1), value=-1.0)
    peak = (search.value >= padded[:, :-2]) & (search.value >= padded[:, 2:])
    # The factor 1e-3 ranks the points beside a maximum after the maxima. Without it the points of one high maximum
    # would take every place. Chosen by hand.
    return search.best(torch.where(peak, search.value, 1e-3 * search.value), _NUM_NEAR)


def _scan_close(resolvent: Resolvent) -> _Search:
    """Search |z| - 1 from `_NEAREST` to `_CLOSE` at the angles of the eigenvalues of largest modulus.

    Next to the circle only eigenvalues close to it make the resolvent large.
    """
    moduli = resolvent.eigenvalues.abs()
    largest = moduli.topk(min(_NUM_DANGEROUS, moduli.shape[1]), dim=-1).indices
    angles = resolvent.eigenvalues.angle().abs().gather(1, largest).sort(-1).values
    search = _crests(resolvent, _levels(_NEAREST, _CLOSE, angles.device), angles)
    return search.best(search.value, _NUM_CLOSE)


def _scan_far(resolvent: Resolvent, matrices: Tensor) -> _Search:
    """Search |z| - 1 from `_FAR` outwards at a few angles.

    There (zI - B)^{-1} is close to (I + B / z) / z. Its leading direction is close to that of the Hermitian part of
    B / z, which depends on the angle only. One start vector serves all levels.
    """
    angles = torch.linspace(0, math.pi, _NUM_FAR_ANGLES, dtype=torch.float64, device=matrices.device)
    turned = torch.polar(torch.ones_like(angles), -angles)[None, :, None, None] * matrices[:, None]
    hermitian = ((turned + turned.mH) / 2).to(torch.complex64)
    leading = torch.linalg.eigh(hermitian).eigenvectors[..., -1].mT.to(resolvent.vectors.dtype)
    # At ten times ||B||_F the resolvent differs little from I / z. Chosen by hand.
    furthest = 10.0 * max(1.0, float(torch.linalg.matrix_norm(matrices).max()))
    search = _crests(resolvent, _levels(_FAR, furthest, angles.device), angles.expand(len(matrices), -1), leading)
    return search.best(search.value, _NUM_FAR)


def _levels(low: float, high: float, device: torch.device) -> Tensor:
    """Return values of log(|z| - 1) from log(low) to log(high), both included, in steps of at most `_LEVEL_STEP`."""
    count = 1 + math.ceil(math.log(high / low) / _LEVEL_STEP)
    return torch.linspace(math.log(low), math.log(high), count, dtype=torch.float64, device=device)


def _crests(resolvent: Resolvent, levels: Tensor, angles: Tensor, start: Tensor | None = None) -> _Search:
    """Find the best of `levels` (G,) at every angle (L, P); `start` (L, R, P) is the same for all levels."""
    shape = (len(angles), levels.numel(), angles.shape[1])
    points = torch.polar((1 + levels.exp())[None, :, None].expand(shape), angles[:, None, :].expand(shape)).flatten(1)
    first = resolvent.probe(points) if start is None else start.repeat(1, 1, levels.numel())
    norms, vectors = resolvent.norm(points, first)
    value, level = (norms.reshape(shape) * levels.exp()[None, :, None]).max(1)
    # The first angle step is half of the wider gap to a neighbour, so that refinement covers all angles between.
    spacing = torch.nn.functional.pad(angles.diff(dim=-1), (1, 1))
    return _Search(
        value=value,
        log_gap=levels[level],
        angle=angles,
        vector=_columns(vectors, level * angles.shape[1] + torch.arange(angles.shape[1], device=level.device)),
        gap_step=_LEVEL_STEP / 2,
        angle_step=torch.maximum(spacing[:, :-1], spacing[:, 1:]) / 2,
    )


def _columns(vectors: Tensor, index: Tensor) -> Tensor:
    """Select columns (L, R, S) of vectors (L, R, P) by index (L, S)."""
    return vectors.gather(-1, index[:, None, :].expand(-1, vectors.shape[1], -1))


def _angles(eigenvalues: Tensor) -> Tensor:
    """Return the angles (L, P) of the near search, in [0, pi], ascending.

    They are the angle of every conjugate pair, one angle between neighbours, 0 and pi. Large operators get an evenly
    thinned selection.
    """
    # The resolvent norm of a real operator is symmetric about the real axis, so [0, pi] is enough. A conjugate pair
    # appears twice in the sorted |arg lambda|: midpoints of neighbours give its own angle and the angles between pairs.
    ordered = eigenvalues.angle().abs().sort(-1).values
    middle = (ordered[:, 1:] + ordered[:, :-1]) / 2
    if middle.shape[1] > _MAX_ANGLES:
        picks = torch.linspace(0, middle.shape[1] - 1, _MAX_ANGLES, device=middle.device).round().long()
        middle = middle[:, picks]
    zero = torch.zeros_like(ordered[:, :1])
    return torch.cat((zero, middle, zero + math.pi), dim=1)
