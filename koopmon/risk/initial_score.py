"""Risk at initialisation: the score of arXiv 2602.22988 and its level (docs/method.md, "Risk at initialisation")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

Level = Literal["low", "moderate", "high", "unknown"]

LOW_NEAR_UNIT_MASS = 0.3
"""Score below which the level is low: the paper's guidance."""
HIGH_NEAR_UNIT_MASS = 0.5
"""Score above which the level is high: the paper's guidance."""
HIGH_CONDITION_NUMBER = 1e4
"""Mean eigenvector condition number above which the level is high.

The paper asks for a "large kappa" without a figure; this one is ours. Rank-32 profiles of well-behaved layers stay
below 1e3.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitialRisk:
    """Score of a profile at initialisation and its level.

    The score separates architectures and does not depend on the learning rate, so no action follows from it. Scores of
    different `svd_rank` or `num_samples` are different quantities.
    """

    score: Annotated[float, Meta(ge=0.0, le=1.0)] | None
    """Near-unit mass, mean over layers, in [0, 1]; None when the profile is not informative."""
    level: Level
    """Level by the thresholds above; "unknown" when the profile is not informative."""
    informative: bool
    """True when at least half of the layers are informative."""
    reason: str
    """Reason for the level."""
    svd_rank: int | None
    """Truncation of the profile; None is full rank."""
    num_samples: int
    """Number of tokens of the profile."""
    update_exponent: float | None = None
    """Update exponent of the stack, a feature of `koopmon.risk.calibration`; None when not informative."""


def initial_risk(profile: SpectralProfile, *, known_exponent: float | None = None) -> InitialRisk:
    """Score a profile that was taken before training.

    Args:
        profile: the profile of the initial model.
        known_exponent: update exponent from the structure of the model; None takes that of the profile.

    Returns:
        The score and its level. An identity initialisation (Fixup, ReZero) has near-unit mass 1 and trains well. Its
        update ratio is near 0, so the profile is not informative and the level is "unknown".
    """
    first = profile.layers[0]  # All layers of a profile share both.
    svd_rank, num_samples = first.svd_rank, first.num_samples
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
