"""How far an operator is from normal: eigenvector condition number and Kreiss constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from koopmon.spectral._linalg import inverses
from koopmon.spectral.resolvent import Resolvent

CONDITION_LIMIT = 1.0 / torch.finfo(torch.float64).eps
"""Condition numbers are capped here: beyond it the operator is defective to working precision."""

KREISS_ACCURACY = 1e-3
"""Relative accuracy of `kreiss_constant` for values up to 1e4: never above the supremum by more than rounding, at most
this much below it. Larger values (operators within about 1e-4 of a defective eigenvalue on the circle) are lower
bounds."""

_DEFECTIVE = 1e8
_PERTURBATION = 1e-10
_SINGLE_PRECISION = 1e4
"""Eigenvector condition numbers: above the first B is perturbed for the search, below the last single precision
does."""

_NEAREST, _CLOSE, _FAR = 1e-6, 1e-3, 1.0
_LEVEL_STEP = 2.0
"""|z| - 1: least, where the search widens from the dangerous angles to all, where it thins out again; log step."""

_MAX_ANGLES = 64
_NUM_DANGEROUS = 8
_NUM_FAR_ANGLES = 5
_NUM_NEAR, _NUM_CLOSE, _NUM_FAR = 5, 1, 2
_NUM_FINE = 2
_ROUGH_ROUNDS, _FINE_ROUNDS = 3, 6
_SHRINK = 0.55
_BATCH_ELEMENTS = 1 << 21


def real_eigenvectors(eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    """A real matrix W = V Q*, with Q unitary, for the eigenvectors V (..., R, R) of real operators.

    Of each conjugate pair it keeps sqrt(2) Re v and sqrt(2) Im v. V and W have the same singular values, and the rows
    of W^{-1} are real and imaginary parts of the left eigenvectors: further work is real, at a quarter of the cost.
    """
    imaginary = eigenvalues.imag.unsqueeze(-2)
    pair = math.sqrt(2.0) * torch.where(imaginary > 0, eigenvectors.real, eigenvectors.imag)
    return torch.where(imaginary == 0, eigenvectors.real, pair)


def condition_number(vectors: Tensor) -> Tensor:
    """kappa_2 (...) of `real_eigenvectors` (..., R, R), capped at `CONDITION_LIMIT`."""
    values = torch.linalg.svdvals(vectors)
    ratio: Tensor = values[..., 0] / values[..., -1]
    return ratio.nan_to_num(nan=CONDITION_LIMIT, posinf=CONDITION_LIMIT).clamp_max(CONDITION_LIMIT)


def kreiss_constant(operator: Tensor, eigen: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """K (...) of finite operators A (..., R, R): sup over |z| > 1 of (|z| - 1) ||(zI - B)^{-1}||_2 (eq. 29).

    B is A / max(1, rho): K of A itself is infinite when rho > 1. K is 1 for normal operators and never less (|z| to
    infinity). It is searched over |z| >= 1 + 1e-6: an operator with a defective eigenvalue on the unit circle gives a
    large finite number. The search finds z alone; the value is that of an SVD of zI - B there. For its accuracy see
    `KREISS_ACCURACY`. Raises ValueError when A is not finite.

    `eigen` are eigenvalues (..., R) and unit eigenvectors (..., R, R) of A, where they are at hand.
    """
    if not torch.isfinite(operator).all():
        raise ValueError("operator holds NaN or infinite values; only finite operators have a Kreiss constant")
    size = operator.shape[-1]
    matrices = operator.double().reshape(-1, size, size)
    eigenvalues, vectors = torch.linalg.eig(matrices) if eigen is None else eigen
    eigenvalues, vectors = eigenvalues.reshape(-1, size), vectors.reshape(-1, size, size)
    chunk = max(1, _BATCH_ELEMENTS // (size * 16 * min(size, _MAX_ANGLES)))
    parts = [slice(first, first + chunk) for first in range(0, len(matrices), chunk)]
    found = [_kreiss(matrices[part], eigenvalues[part], vectors[part]) for part in parts]
    return torch.cat(found).reshape(operator.shape[:-2])


def _resolvents(matrices: Tensor, eigenvalues: Tensor, vectors: Tensor) -> tuple[Resolvent, Resolvent]:
    """The resolvents of B for the fine and the rough search, the latter in single precision where that is good enough.

    Where B is defective to within `_DEFECTIVE` both are those of B plus a perturbation that separates its eigenvalues.
    """
    condition = condition_number(real_eigenvectors(eigenvalues, vectors))
    if (condition > _DEFECTIVE).any():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(matrices.shape[1:], generator=generator, dtype=torch.float64).to(matrices.device)
        size = torch.linalg.matrix_norm(matrices, keepdim=True) * (condition > _DEFECTIVE)[:, None, None]
        eigenvalues, vectors = torch.linalg.eig(matrices + _PERTURBATION * size * noise)
    inverse = inverses(vectors)
    rough = torch.complex64 if condition.max() < _SINGLE_PRECISION else torch.complex128
    return Resolvent(eigenvalues, vectors, inverse), Resolvent(eigenvalues, vectors.to(rough), inverse.to(rough))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """S points z = (1 + exp(log_gap)) exp(i angle) for each of L operators, and the next steps from there.

    value, log_gap, angle, angle_step (L, S); vector (L, R, S): what Lanczos reached.
    """

    value: Tensor
    log_gap: Tensor
    angle: Tensor
    vector: Tensor
    gap_step: float
    angle_step: Tensor

    def best(self, merit: Tensor, count: int) -> _Search:
        """The `count` points of largest merit (L, S)."""
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
        """The points of both."""
        return _Search(
            value=torch.cat((self.value, other.value), -1),
            log_gap=torch.cat((self.log_gap, other.log_gap), -1),
            angle=torch.cat((self.angle, other.angle), -1),
            vector=torch.cat((self.vector, other.vector), -1),
            gap_step=self.gap_step,
            angle_step=torch.cat((self.angle_step, other.angle_step), -1),
        )


def _kreiss(matrices: Tensor, eigenvalues: Tensor, vectors: Tensor) -> Tensor:
    """`kreiss_constant` of a batch (L, R, R)."""
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
    smallest: Tensor = torch.linalg.svdvals(point[:, None, None] * identity - matrices)[:, -1]
    return (gap / smallest).nan_to_num(nan=1.0, posinf=1.0 / _NEAREST).clamp_min(1.0)


def _refine(resolvent: Resolvent, search: _Search) -> _Search:
    """Move every point to the best of itself and its eight neighbours, and take smaller steps from there."""
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
    """The coarse search around the circle: peaks over the angle rank before their slopes."""
    angles = _angles(resolvent.eigenvalues)
    search = _crests(resolvent, _levels(_CLOSE, _FAR, angles.device), angles)
    padded = torch.nn.functional.pad(search.value, (1, 1), value=-1.0)
    peak = (search.value >= padded[:, :-2]) & (search.value >= padded[:, 2:])
    return search.best(torch.where(peak, search.value, 1e-3 * search.value), _NUM_NEAR)


def _scan_close(resolvent: Resolvent) -> _Search:
    """The coarse search next to the circle, where only eigenvalues on it can matter."""
    moduli = resolvent.eigenvalues.abs()
    largest = moduli.topk(min(_NUM_DANGEROUS, moduli.shape[1]), dim=-1).indices
    angles = resolvent.eigenvalues.angle().abs().gather(1, largest).sort(-1).values
    search = _crests(resolvent, _levels(_NEAREST, _CLOSE, angles.device), angles)
    return search.best(search.value, _NUM_CLOSE)


def _scan_far(resolvent: Resolvent, matrices: Tensor) -> _Search:
    """The coarse search far out: the resolvent is close to I / z there, its leading direction to that of Re(B / z)."""
    angles = torch.linspace(0, math.pi, _NUM_FAR_ANGLES, dtype=torch.float64, device=matrices.device)
    turned = torch.polar(torch.ones_like(angles), -angles)[None, :, None, None] * matrices[:, None]
    hermitian = ((turned + turned.mH) / 2).to(torch.complex64)
    leading = torch.linalg.eigh(hermitian).eigenvectors[..., -1].mT.to(resolvent.vectors.dtype)
    furthest = 10.0 * max(1.0, float(torch.linalg.matrix_norm(matrices).max()))
    search = _crests(resolvent, _levels(_FAR, furthest, angles.device), angles.expand(len(matrices), -1), leading)
    return search.best(search.value, _NUM_FAR)


def _levels(low: float, high: float, device: torch.device) -> Tensor:
    """log(|z| - 1) in steps of `_LEVEL_STEP` at most, both ends included."""
    count = 1 + math.ceil(math.log(high / low) / _LEVEL_STEP)
    return torch.linspace(math.log(low), math.log(high), count, dtype=torch.float64, device=device)


def _crests(resolvent: Resolvent, levels: Tensor, angles: Tensor, start: Tensor | None = None) -> _Search:
    """At every angle (L, P) the best of `levels` (G,); `start` (L, R, P) is the same for all levels."""
    shape = (len(angles), levels.numel(), angles.shape[1])
    points = torch.polar((1 + levels.exp())[None, :, None].expand(shape), angles[:, None, :].expand(shape)).flatten(1)
    first = resolvent.probe(points) if start is None else start.repeat(1, 1, levels.numel())
    norms, vectors = resolvent.norm(points, first)
    value, level = (norms.reshape(shape) * levels.exp()[None, :, None]).max(1)
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
    """Columns (L, R, S) of vectors (L, R, P) by index (L, S)."""
    return vectors.gather(-1, index[:, None, :].expand(-1, vectors.shape[1], -1))


def _angles(eigenvalues: Tensor) -> Tensor:
    """Angles in [0, pi] to look at (L, P), ascending: every conjugate pair's own and one between neighbours.

    Real operators are symmetric about the real axis. Midpoints of the sorted |arg lambda| give both at once, for a pair
    appears twice; the angles of large operators are thinned evenly.
    """
    ordered = eigenvalues.angle().abs().sort(-1).values
    middle = (ordered[:, 1:] + ordered[:, :-1]) / 2
    if middle.shape[1] > _MAX_ANGLES:
        picks = torch.linspace(0, middle.shape[1] - 1, _MAX_ANGLES, device=middle.device).round().long()
        middle = middle[:, picks]
    zero = torch.zeros_like(ordered[:, :1])
    return torch.cat((zero, middle, zero + math.pi), dim=1)
