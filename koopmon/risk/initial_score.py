"""Risk at initialisation: the paper's score, and when it says nothing (docs/method.md, "Risk at initialisation")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

Level = Literal["low", "moderate", "high", "unknown"]

LOW_NEAR_UNIT_MASS = 0.3
HIGH_NEAR_UNIT_MASS = 0.5
HIGH_CONDITION_NUMBER = 1e4
"""Ours: the paper says "large kappa" without a figure. Ranks of 32 on well-behaved layers stay below 1e3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialRisk:
    """`score` is the near-unit mass, mean over the informative layers, in [0, 1]; None when not informative.

    It separates architectures and knows nothing of the learning rate, so it never acts alone. It belongs to one
    (svd_rank, num_samples): scores at other settings are other quantities.
    """

    score: Annotated[float, Meta(ge=0.0, le=1.0)] | None
    level: Level
    informative: bool
    reason: str
    svd_rank: int | None
    num_samples: int
    update_exponent: float | None = None
    """Of the stack, over the informative layers; what `koopmon.risk.calibration` joins with the learning rate."""


def initial_risk(profile: SpectralProfile, *, known_exponent: float | None = None) -> InitialRisk:
    """Score `profile`, taken before training moved the weights. `known_exponent` is what the model's family knows.

    An identity initialisation (Fixup, ReZero) has near-unit mass 1 and trains well: its update ratio is near 0, the
    profile is not informative, and the level is "unknown" and never "high".
    """
    first = profile.layers[0] if profile.layers else None
    svd_rank, num_samples = (first.svd_rank, first.num_samples) if first else (None, 0)
    if not profile.informative:
        return InitialRisk(
            score=None,
            level="unknown",
            informative=False,
            reason=profile.reason,
            svd_rank=svd_rank,
            num_samples=num_samples,
        )
    score = profile.mean("near_unit_mass")
    kappa = profile.mean("eigenvector_condition_number")
    level: Level
    if score > HIGH_NEAR_UNIT_MASS:
        level, why = "high", f"near-unit mass {score:.2f} is above {HIGH_NEAR_UNIT_MASS}"
    elif kappa > HIGH_CONDITION_NUMBER:
        level, why = "high", f"eigenvector condition number {kappa:.1e} is above {HIGH_CONDITION_NUMBER:.0e}"
    elif score < LOW_NEAR_UNIT_MASS:
        level, why = "low", f"near-unit mass {score:.2f} is below {LOW_NEAR_UNIT_MASS}"
    else:
        level, why = "moderate", f"near-unit mass {score:.2f} is between {LOW_NEAR_UNIT_MASS} and {HIGH_NEAR_UNIT_MASS}"
    return InitialRisk(
        score=score,
        level=level,
        informative=True,
        reason=why,
        svd_rank=svd_rank,
        num_samples=num_samples,
        update_exponent=profile.update_exponent if known_exponent is None else known_exponent,
    )
