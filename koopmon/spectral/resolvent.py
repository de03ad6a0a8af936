"""Norms of the resolvent (zI - B)^{-1} at many points z, from one eigendecomposition of B.

V diag(1 / (z - lambda)) V^{-1} applies the resolvent by two matrix products for all points. A point costs O(R^2);
an SVD would cost O(R^3). All other operations are elementwise over the points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Resolvent:
    """Eigendecompositions of L operators of size R."""

    eigenvalues: Tensor
    """(L, R), complex128."""
    vectors: Tensor
    """(L, R, R), complex: eigenvectors V in the columns. Their dtype is that of the products."""
    inverse: Tensor
    """(L, R, R): V^{-1}, in the dtype of `vectors`."""

    def probe(self, points: Tensor) -> Tensor:
        """Compute unit start vectors (L, R, P) at the points z (L, P): R* applied to a fixed random vector.

        R* = V^{-*} diag(1 / conj(z - lambda)) V* turns the vector towards the leading right singular vectors.
        """
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn(self.eigenvalues.shape[1], 1, 2, generator=generator, dtype=torch.float64, device="cpu").to(
            points.device
        )
        vector = torch.view_as_complex(draw).to(self.vectors.dtype)
        return _unit(self.inverse.mH @ (self._poles(points).conj() * (self.vectors.mH @ vector)))

    def norm(self, points: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Estimate the resolvent norms at the points by two Lanczos steps.

        An estimate is the largest ||R q|| over unit q in span{q_0, R* R q_0}, with q_0 from `start`. A search that
        passes the vectors on converges while its points move.

        Args:
            points: z, (L, P), complex128.
            start: (L, R, P), unit columns, in the dtype of `vectors`.

        Returns:
            Lower bounds of the norms (L, P), float64, and the unit vectors (L, R, P) that reach them.
        """
        poles = self._poles(points)
        image = self._apply(poles, start)
        if start.shape[1] == 1:
            return _inner(image, image).real.sqrt().double(), start
        other = _unit(self.inverse.mH @ (poles.conj() * (self.vectors.mH @ image)))
        # One orthogonalisation leaves rounding errors along `start` where `start` is nearly a singular vector. The
        # second one removes them.
        for _ in range(2):
            other = _unit(other - _inner(start, other)[:, None, :] * start)
        other_image = self._apply(poles, other)
        # R* R restricted to the two vectors is the Hermitian matrix [[first, mixed], [conj(mixed), second]]. Its
        # largest eigenvalue is the squared norm.
        first, second = _inner(image, image).real, _inner(other_image, other_image).real
        mixed = _inner(image, other_image)
        half_gap = (first - second) / 2
        spread = torch.hypot(half_gap, mixed.abs())
        largest = (first + second) / 2 + spread
        # The eigenvector has two forms, (half_gap + spread, conj(mixed)) and (mixed, spread - half_gap). The sign of
        # half_gap selects the form whose sum has no cancellation.
        lead = half_gap.abs() + spread
        lead = torch.where(lead > 0, lead, 1.0).to(mixed.dtype)
        weight = torch.where(half_gap >= 0, lead, mixed)
        other_weight = torch.where(half_gap >= 0, mixed.conj(), lead)
        reached = _unit(weight[:, None, :] * start + other_weight[:, None, :] * other)
        return largest.sqrt().double(), reached

    def _apply(self, poles: Tensor, vectors: Tensor) -> Tensor:
        """Apply V diag(poles) V^{-1} to vectors (L, R, P)."""
        image: Tensor = self.vectors @ (poles * (self.inverse @ vectors))
        return image

    def _poles(self, points: Tensor) -> Tensor:
        """Compute 1 / (z - lambda), (L, R, P). The difference is float64, because points and eigenvalues are close."""
        return (points[:, None, :] - self.eigenvalues[:, :, None]).to(self.vectors.dtype).reciprocal()


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Compute the inner products (L, P) of columns (L, R, P)."""
    return (left.conj() * right).sum(1)


def _unit(vectors: Tensor) -> Tensor:
    """Normalise columns (L, R, P); zero columns stay zero."""
    length = _inner(vectors, vectors).real.sqrt()
    return vectors * length.clamp_min(torch.finfo(length.dtype).tiny).reciprocal()[:, None, :]
