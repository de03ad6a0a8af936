"""Profiles of a layer and of a stack, as frozen records with conversion to and from JSON types."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, NamedTuple, overload

import torch
from torch import Tensor

from koopmon.numbers import mean
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


class Thirds(NamedTuple):
    """Means over the early, middle and late third of the depth; None where no layer has the field."""

    early: float | None
    middle: float | None
    late: float | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerProfile:
    """Spectrum of one transition h_l -> h_{l+1} in whitened coordinates (arXiv 2602.22988, eqs. 5-13 and 29).

    All numbers are finite, also where `informative` is False. docs/method.md has their definitions.
    """

    eigenvalues: Tensor
    """(R,), complex128, by descending modulus, then real part.

    Conjugate pairs are adjacent; the value with the positive imaginary part is first.
    """
    near_unit_mass: float
    """Share of eigenvalues with a modulus in [0.90, 1.05] (eq. 12)."""
    expansive_mass: float
    """Share of eigenvalues with a modulus above 1.05 (eq. 11)."""
    contractive_mass: float
    """Share of eigenvalues with a modulus below 0.80 (eq. 13)."""
    spectral_radius: float
    """Largest modulus of the eigenvalues, at least 0."""
    eigenvector_condition_number: float
    """sigma_max / sigma_min of the unit right eigenvectors, from 1 to 1 / machine epsilon."""
    kreiss_constant: float | None
    """Kreiss constant of A / max(1, rho) (eq. 29), at least 1; None where it was not computed."""
    nonlinearity_ratio: float
    """Share eta of the update that the linear map does not explain, at least 0 (eq. 5)."""
    update_ratio: float
    """||y_w - x_w||_F / ||x_w||_F, at least 0. A layer with a value near 0 is nearly the identity (ours)."""
    update_exponent: float
    """k of ||y - x|| ~ ||x||^k over the samples: 0 behind a normalisation, 1 for a linear layer (ours)."""
    reliable_mode_ratio: float
    """Share of modes with a residual of at most 0.1 (eq. 10)."""
    reliable_near_unit_mass: float
    """Near-unit share among the reliable modes; 0 without any."""
    num_samples: int
    """N, the number of tokens."""
    svd_rank: int | None
    """Truncation asked for; None is full rank. Profiles of different rank or N are different quantities."""
    informative: bool
    """True when the samples determine the spectrum and the layer changes the state."""
    reason: str
    """Reason against an informative layer, or a caution; empty without either."""
    stream_rms: float | None = None
    """Root mean square of the states behind the layer; None in a profile of an earlier version."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; eigenvalues become [re, im] pairs."""
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
        """Convert from the result of `to_dict`."""
        pairs = [complex(real, imaginary) for real, imaginary in data["eigenvalues"]]
        rest = {name: value for name, value in data.items() if name != "eigenvalues"}
        return cls(eigenvalues=torch.tensor(pairs, dtype=torch.complex128, device="cpu"), **rest)


FIELDS: Final = tuple(field.name for field in fields(LayerProfile) if str(field.type).startswith("float"))
"""Names of the numbers of a `LayerProfile`. Each is finite; `kreiss_constant` and `stream_rms` may be None."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SpectralProfile:
    """Profiles of L transitions, by depth.

    Aggregates cover all layers. `risk` and `update_exponent` cover the informative ones.
    """

    layers: tuple[LayerProfile, ...]

    @property
    def num_layers(self) -> int:
        """L, the number of transitions."""
        return len(self.layers)

    @property
    def num_samples(self) -> int:
        """N, the number of tokens, equal for all layers."""
        return self.layers[0].num_samples

    @property
    def svd_rank(self) -> int | None:
        """Truncation asked for; None is full rank."""
        return self.layers[0].svd_rank

    @property
    def informative(self) -> bool:
        """True when at least half of the layers are informative."""
        return 2 * sum(layer.informative for layer in self.layers) >= self.num_layers

    @property
    def reason(self) -> str:
        """Each distinct reason of the layers with its number of layers; empty without any."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            if layer.reason:
                counts[layer.reason] = counts.get(layer.reason, 0) + 1
        return "; ".join(f"{count} of {self.num_layers} layers: {reason}" for reason, count in counts.items())

    @property
    def update_exponent(self) -> float | None:
        """Update exponent of the stack: the lower of the first informative layer's and the median of these layers.

        None when the profile is not informative.
        """
        if not self.informative:
            return None
        return stack_exponent([layer.update_exponent for layer in self.layers if layer.informative])

    @property
    def risk(self) -> float | None:
        """Score of arXiv 2602.22988: mean near-unit mass over informative layers, in [0, 1].

        None when the profile is not informative.
        """
        if not self.informative:
            return None
        return mean([layer.near_unit_mass for layer in self.layers if layer.informative])

    @overload
    def mean(self, field: FloatField) -> float: ...
    @overload
    def mean(self, field: str) -> float | None: ...
    def mean(self, field: str) -> float | None:
        """Compute the mean of a field over layers.

        Only `kreiss_constant` and `stream_rms` can be missing from layers; the result is None when all lack it. An
        unknown field raises ValueError.
        """
        return mean(self._values(field))

    @overload
    def max(self, field: FloatField) -> float: ...
    @overload
    def max(self, field: str) -> float | None: ...
    def max(self, field: str) -> float | None:
        """Compute the largest value of a field over layers; None and errors as in `mean`."""
        return self._aggregate(field, max)

    @overload
    def min(self, field: FloatField) -> float: ...
    @overload
    def min(self, field: str) -> float | None: ...
    def min(self, field: str) -> float | None:
        """Compute the smallest value of a field over layers; None and errors as in `mean`."""
        return self._aggregate(field, min)

    @overload
    def std(self, field: FloatField) -> float: ...
    @overload
    def std(self, field: str) -> float | None: ...
    def std(self, field: str) -> float | None:
        """Compute the standard deviation of a field over layers, with the divisor L; None and errors as in `mean`."""
        return self._aggregate(field, _std)

    def thirds(self, field: str) -> Thirds:
        """Compute the means of a field over early, middle and late layers; errors as in `mean`.

        With fewer than three layers, an empty third takes the mean over all layers.
        """
        values = self._values(field)
        first, second = round(self.num_layers / 3), round(2 * self.num_layers / 3)
        parts = (values[:first], values[first:second], values[second:])
        return Thirds(*(mean(part or values) for part in parts))

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types. `from_dict` reads `layers` only; the other keys are derived from them."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "risk": self.risk,
            "informative": self.informative,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpectralProfile:
        """Convert from the result of `to_dict`."""
        return cls(layers=tuple(LayerProfile.from_dict(layer) for layer in data["layers"]))

    def _values(self, field: str) -> list[float | None]:
        if field not in FIELDS:
            raise ValueError(f"field = {field!r}: allowed are {', '.join(FIELDS)}")
        return [getattr(layer, field) for layer in self.layers]

    def _aggregate(self, field: str, reduce: Callable[[Sequence[float]], float | None]) -> float | None:
        values = [value for value in self._values(field) if value is not None]
        return reduce(values) if values else None


def _std(values: Sequence[float]) -> float:
    """Compute the standard deviation with the divisor len(values), at most the largest float."""
    centre = mean(values) or 0.0
    try:
        return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / len(values))
    except OverflowError:
        # hypot scales its arguments, so it needs no squares. The division by sqrt(L) comes first for the same reason.
        root = math.sqrt(len(values))
        return min(math.hypot(*((value - centre) / root for value in values)), sys.float_info.max)
