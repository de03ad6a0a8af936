"""Norms of the resolvent (zI - B)^{-1} at many points z at once, from one eigendecomposition of B.

V diag(1 / (z - lambda)) V^{-1} acts on the vectors of all points by one matrix product each way: O(R^2) for a point
where an SVD takes O(R^3). Everything else is elementwise over the points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Resolvent:
    """L operators of size R: eigenvalues (L, R), complex128; vectors V and their inverse (L, R, R), complex."""

    eigenvalues: Tensor
    vectors: Tensor
    inverse: Tensor

    def probe(self, points: Tensor) -> Tensor:
        """Unit vectors (L, R, P) to start from at z (L, P): a fixed random vector seen through R*."""
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(self.vectors.shape[-1], 1, 2, generator=generator, dtype=torch.float64).to(points.device)
        vector = torch.view_as_complex(draw).to(self.vectors.dtype)
        return _unit(self.inverse.mH @ (self._poles(points).conj() * (self.vectors.mH @ vector)))

    def norm(self, points: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Norms (L, P) at z (L, P), from below, and the unit vectors (L, R, P) at which they are reached.

        That is the largest ||R q|| over unit q in span{q_0, R* R q_0}, q_0 the unit `start` (L, R, P): two steps of
        Lanczos. A search that hands the vectors on converges as it moves.
        """
        poles = self._poles(points)
        image = self._apply(poles, start)
        if start.shape[1] == 1:
            return _inner(image, image).real.sqrt().double(), start
        other = _unit(self.inverse.mH @ (poles.conj() * (self.vectors.mH @ image)))
        for _ in range(2):  # once leaves noise that is not orthogonal when `start` is all but a singular vector
            other = _unit(other - _inner(start, other)[:, None, :] * start)
        other_image = self._apply(poles, other)
        first, second = _inner(image, image).real, _inner(other_image, other_image).real
        mixed = _inner(image, other_image)
        half_gap = (first - second) / 2
        spread = torch.hypot(half_gap, mixed.abs())
        largest = (first + second) / 2 + spread
        lead = half_gap.abs() + spread
        lead = torch.where(lead > 0, lead, 1.0).to(mixed.dtype)
        weight = torch.where(half_gap >= 0, lead, mixed)
        other_weight = torch.where(half_gap >= 0, mixed.conj(), lead)
        reached = _unit(weight[:, None, :] * start + other_weight[:, None, :] * other)
        return largest.sqrt().double(), reached

    def _apply(self, poles: Tensor, vectors: Tensor) -> Tensor:
        image: Tensor = self.vectors @ (poles * (self.inverse @ vectors))
        return image

    def _poles(self, points: Tensor) -> Tensor:
        """1 / (z - lambda): (L, R, P). The difference is taken in double precision: poles and points are close."""
        return (points[:, None, :] - self.eigenvalues[:, :, None]).to(self.vectors.dtype).reciprocal()


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """<left, right> of columns (L, R, P): (L, P)."""
    return (left.conj() * right).sum(1)


def _unit(vectors: Tensor) -> Tensor:
    """Columns (L, R, P) made unit; zero ones stay."""
    length = _inner(vectors, vectors).real.sqrt()
    return vectors * length.clamp_min(torch.finfo(length.dtype).tiny).reciprocal()[:, None, :]
