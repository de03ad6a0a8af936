"""What is known of a layer and of a whole stack: plain frozen records, to and from JSON types."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Literal, NamedTuple, overload

import torch
from torch import Tensor

from koopmon.spectral.update_exponent import stack_exponent

FloatField = Literal[
    "near_unit_mass",
    "expansive_mass",
    "contractive_mass",
    "spectral_radius",
    "eigenvector_condition_number",
    "nonlinearity_ratio",
    "update_ratio",
    "update_exponent",
    "reliable_mode_ratio",
    "reliable_near_unit_mass",
]
FIELDS: Final[tuple[str, ...]] = (
    "near_unit_mass",
    "expansive_mass",
    "contractive_mass",
    "spectral_radius",
    "eigenvector_condition_number",
    "kreiss_constant",
    "nonlinearity_ratio",
    "update_ratio",
    "update_exponent",
    "reliable_mode_ratio",
    "reliable_near_unit_mass",
)
"""The numbers of a `LayerProfile`, each finite; only `kreiss_constant` may be None."""


class Thirds(NamedTuple):
    """Means over the early, middle and late third of the depth."""

    early: float | None
    middle: float | None
    late: float | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerProfile:
    """The spectrum of one transition h_l -> h_{l+1}, in whitened coordinates (eqs. 5-13 and 29; docs/method.md).

    Numbers are always finite, also where `informative` is False: there they describe what little the samples hold.
    """

    eigenvalues: Tensor
    """Complex, (R,), by descending modulus, then real part; conjugate pairs adjacent, positive imaginary part first."""
    near_unit_mass: float
    """Fraction of eigenvalues with modulus in [0.90, 1.05] (eq. 12)."""
    expansive_mass: float
    """Fraction with modulus above 1.05 (eq. 11)."""
    contractive_mass: float
    """Fraction with modulus below 0.80 (eq. 13)."""
    spectral_radius: float
    eigenvector_condition_number: float
    """sigma_max / sigma_min of the unit right eigenvectors, capped at 1 / machine epsilon."""
    kreiss_constant: float | None
    """Of A / max(1, rho) (eq. 29), at least 1; None where it was not asked for."""
    nonlinearity_ratio: float
    """What a linear map cannot explain of the update (eq. 5)."""
    update_ratio: float
    """||y_w - x_w||_F / ||x_w||_F: near 0 the layer does nothing that could be analysed."""
    update_exponent: float
    """k of ||y - x|| ~ ||x||^k over the samples: 0 behind a normalisation, 1 for a linear map (ours)."""
    reliable_mode_ratio: float
    """Fraction of modes whose residual (eq. 10) is at most 0.1."""
    reliable_near_unit_mass: float
    """Near-unit fraction among the reliable modes; 0 when there are none."""
    num_samples: int
    svd_rank: int | None
    """The truncation asked for; None is full rank. Profiles of different rank or N are different quantities."""
    informative: bool
    reason: str
    """Why not informative, or a caution; empty when all is well."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; eigenvalues as [re, im] pairs."""
        pairs = [[value.real, value.imag] for value in self.eigenvalues.tolist()]
        numbers = {name: getattr(self, name) for name in FIELDS}
        return {
            "eigenvalues": pairs,
            **numbers,
            "num_samples": self.num_samples,
            "svd_rank": self.svd_rank,
            "informative": self.informative,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerProfile:
        """The inverse of `to_dict`."""
        pairs = [complex(real, imaginary) for real, imaginary in data["eigenvalues"]]
        rest = {name: value for name, value in data.items() if name != "eigenvalues"}
        return cls(eigenvalues=torch.tensor(pairs, dtype=torch.complex128), **rest)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SpectralProfile:
    """The profiles of L transitions, by depth. Aggregates run over all layers; `risk` over the informative ones."""

    layers: tuple[LayerProfile, ...]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_samples(self) -> int:
        """N, the same for every layer."""
        return self.layers[0].num_samples

    @property
    def svd_rank(self) -> int | None:
        return self.layers[0].svd_rank

    @property
    def informative(self) -> bool:
        """True when at least half of the layers are."""
        return 2 * sum(layer.informative for layer in self.layers) >= self.num_layers

    @property
    def reason(self) -> str:
        """Each distinct reason of the layers with how many share it; empty when all is well."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            if layer.reason:
                counts[layer.reason] = counts.get(layer.reason, 0) + 1
        return "; ".join(f"{count} of {self.num_layers} layers: {reason}" for reason, count in counts.items())

    @property
    def update_exponent(self) -> float | None:
        """That of the stack (`stack_exponent`), over informative layers; None when not informative."""
        if not self.informative:
            return None
        return stack_exponent([layer.update_exponent for layer in self.layers if layer.informative])

    @property
    def risk(self) -> float | None:
        """The paper's score: mean near-unit mass over informative layers, in [0, 1]; None when not informative."""
        if not self.informative:
            return None
        return _mean([layer.near_unit_mass for layer in self.layers if layer.informative])

    @overload
    def mean(self, field: FloatField) -> float: ...
    @overload
    def mean(self, field: str) -> float | None: ...
    def mean(self, field: str) -> float | None:
        """Mean over layers; None when no layer holds the field (only `kreiss_constant` can be missing)."""
        return self._aggregate(field, _mean)

    @overload
    def max(self, field: FloatField) -> float: ...
    @overload
    def max(self, field: str) -> float | None: ...
    def max(self, field: str) -> float | None:
        """Largest over layers, as `mean`."""
        return self._aggregate(field, max)

    @overload
    def min(self, field: FloatField) -> float: ...
    @overload
    def min(self, field: str) -> float | None: ...
    def min(self, field: str) -> float | None:
        """Smallest over layers, as `mean`."""
        return self._aggregate(field, min)

    @overload
    def std(self, field: FloatField) -> float: ...
    @overload
    def std(self, field: str) -> float | None: ...
    def std(self, field: str) -> float | None:
        """Standard deviation over layers (of the layers themselves: divided by L), as `mean`."""
        return self._aggregate(field, _std)

    def thirds(self, field: str) -> Thirds:
        """Means over early, middle and late layers; of fewer than three layers, an empty third is the mean over all."""
        values = self._values(field)
        first, second = round(self.num_layers / 3), round(2 * self.num_layers / 3)
        parts = (values[:first], values[first:second], values[second:])
        means = [_mean([v for v in (part or values) if v is not None]) for part in parts]
        return Thirds(*means)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads `layers` only, the rest is for the reader."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "risk": self.risk,
            "informative": self.informative,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpectralProfile:
        """The inverse of `to_dict`."""
        return cls(layers=tuple(LayerProfile.from_dict(layer) for layer in data["layers"]))

    def _values(self, field: str) -> list[float | None]:
        if field not in FIELDS:
            raise ValueError(f"field = {field!r}: allowed are {', '.join(FIELDS)}")
        return [getattr(layer, field) for layer in self.layers]

    def _aggregate(self, field: str, reduce: Callable[[Sequence[float]], float | None]) -> float | None:
        values = [value for value in self._values(field) if value is not None]
        return reduce(values) if values else None


def finite_mean(values: Sequence[float]) -> float:
    """Mean of finite values, of which there must be one at least; finite also where their sum is not."""
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return float(sum(map(Fraction, values)) / len(values))


def _mean(values: Sequence[float]) -> float | None:
    return finite_mean(values) if values else None


def _std(values: Sequence[float]) -> float:
    centre = finite_mean(values)
    try:
        return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / len(values))
    except OverflowError:
        root = math.sqrt(len(values))
        return min(math.hypot(*((value - centre) / root for value in values)), sys.float_info.max)
