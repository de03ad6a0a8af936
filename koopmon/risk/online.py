"""The online detector: how violently the layers' maps change from snapshot to snapshot, against what calm training
does.

Near-unit mass alone is blind to a learning rate that is too high, and growth alone cannot decide: healthy runs grow
their update ratio too (METHOD section 8). What separated our recorded runs is unsteadiness: in a healthy run the
update ratio of every layer moves smoothly, also when it takes off; under a rate that will kill the run single layers
lurch, up and down, for a step or two at a time, long before the loss moves. With z_l = log(update_ratio_l + floor),
the speed of layer l is |dz_l| per optimizer step. Two quantities are taken: the peak (the fastest layer between the
last two snapshots) and the speed (the largest of the layers' running means). Each is divided by its scale, and v is
their mean; or, when that is larger, the slow mean of the peak over its own scale, since some runs die after lasting
unrest without one great lurch. Layers that a normalisation brakes may lurch more and live, and the near-unit mass at
the start tells them apart: v is divided by 1 + prior_strength * (1 - initial near-unit mass). Where a family's linear
maps explain little of what its layers do, as those of splines, v counts by 1 - reliability_weight * (1 - share of
reliable modes). risk = v^4 / (1 + v^4): one half where v is 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from koopmon.config import RiskConfig

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What one snapshot says: aggregates over layers, and the update ratio of each layer. Absent scalars are None."""

    step: int
    informative: bool
    reason: str = ""
    non_finite: bool = False
    """The states held NaN or infinity: the run has diverged."""
    update_ratios: tuple[float, ...] = ()
    near_unit_mass: float | None = None
    expansive_mass: float | None = None
    spectral_radius: float | None = None
    max_spectral_radius: float | None = None
    update_ratio: float | None = None
    nonlinearity_ratio: float | None = None
    reliable_mode_ratio: float | None = None
    learning_rate: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    lr_scale: float = 1.0
    kss_alpha: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskState:
    """What the detector remembers of one run. z is log(update ratio + floor), one value per layer."""

    initial_near_unit_mass: float | None = None
    step: int | None = None
    z: tuple[float, ...] = ()
    speed: tuple[float, ...] = ()
    """Running mean of |dz| per step, one value per layer."""
    restlessness: float = 0.0
    """Slow running mean of the peak, each peak counted as 1 at most."""
    lr_scale: float = 1.0
    """koopmon's scale at the last snapshot: once it is lowered, earlier restlessness is no longer evidence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineRisk:
    """`value` in [0, 1]; `components` are v ("unsteadiness") and its parts, each 1 at its scale."""

    value: float
    reason: str
    components: Mapping[str, float] = field(default_factory=dict)


def observe(
    profile: SpectralProfile | None,
    *,
    step: int,
    learning_rate: float | None = None,
    loss: float | None = None,
    grad_norm: float | None = None,
    lr_scale: float = 1.0,
    kss_alpha: float = 0.0,
    non_finite: bool = False,
) -> Observation:
    """Reduce a profile to what the detector and the policy look at. `profile` is None when the states were not
    finite."""
    scalars = {
        "step": step,
        "learning_rate": learning_rate,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr_scale": lr_scale,
        "kss_alpha": kss_alpha,
    }
    if profile is None or non_finite:
        reason = "the states are not finite" if non_finite else "no profile"
        return Observation(informative=False, reason=reason, non_finite=non_finite, **scalars)  # type: ignore[arg-type]
    ratios = tuple(layer.update_ratio for layer in profile.layers)
    if not profile.informative:
        return Observation(informative=False, reason=profile.reason, update_ratios=ratios, **scalars)  # type: ignore[arg-type]
    return Observation(
        informative=True,
        update_ratios=ratios,
        near_unit_mass=profile.mean("near_unit_mass"),
        expansive_mass=profile.mean("expansive_mass"),
        spectral_radius=profile.mean("spectral_radius"),
        max_spectral_radius=profile.max("spectral_radius"),
        update_ratio=profile.mean("update_ratio"),
        nonlinearity_ratio=profile.mean("nonlinearity_ratio"),
        reliable_mode_ratio=profile.mean("reliable_mode_ratio"),
        **scalars,  # type: ignore[arg-type]
    )


def assess(state: RiskState, observation: Observation, config: RiskConfig) -> tuple[RiskState, OnlineRisk]:
    """Score one observation against the run's own history; returns the new history and the risk."""
    if observation.non_finite:
        return state, OnlineRisk(value=1.0, reason="the residual stream is not finite")
    if not observation.informative:
        return state, OnlineRisk(value=0.0, reason=f"not informative: {observation.reason}")
    z = tuple(math.log(max(ratio, 0.0) + config.update_ratio_floor) for ratio in observation.update_ratios)
    first = state.initial_near_unit_mass
    if first is None:
        first = observation.near_unit_mass
    if state.step is None or observation.step <= state.step or len(z) != len(state.z):
        fresh = RiskState(initial_near_unit_mass=first, step=observation.step, z=z)
        return fresh, OnlineRisk(value=0.0, reason="first snapshot")
    gap = min(max(observation.step - state.step, config.min_gap_steps), config.max_gap_steps)
    latest = tuple(abs(new - old) / gap for new, old in zip(z, state.z, strict=True))
    weight = config.smoothing
    before = state.speed or (0.0,) * len(z)
    speed = tuple((1 - weight) * old + weight * new for new, old in zip(latest, before, strict=True))
    layer = latest.index(max(latest))
    peak, fastest = latest[layer] / config.peak_scale, max(speed) / config.speed_scale
    slow = config.restlessness_smoothing
    restless = 0.0 if observation.lr_scale < state.lr_scale else state.restlessness
    restless = (1 - slow) * restless + slow * min(peak, 1.0)
    state = replace(
        state,
        initial_near_unit_mass=first,
        step=observation.step,
        z=z,
        speed=speed,
        restlessness=restless,
        lr_scale=observation.lr_scale,
    )
    lasting = restless / config.restlessness_scale
    brake = 1.0 + config.prior_strength * (1.0 - (first if first is not None else 1.0))
    reliable = 1.0 if observation.reliable_mode_ratio is None else observation.reliable_mode_ratio
    reliability = 1.0 - config.reliability_weight * (1.0 - reliable)
    v = max(0.5 * (peak + fastest), lasting) / brake * reliability
    fourth = min(v, 1e3) ** 4
    reason = (
        f"unsteadiness {v:.2f} of the update ratio "
        f"(peak {peak:.2f} in layer {layer}, speed {fastest:.2f}, lasting {lasting:.2f}, brake {brake:.2f})"
    )
    if reliability < 1.0:
        reason += f", weighed by {reliability:.2f} for its reliable modes"
    parts = {"unsteadiness": v, "peak": peak, "speed": fastest, "lasting": lasting, "brake": brake}
    return state, OnlineRisk(value=fourth / (1 + fourth), reason=reason, components=parts)
