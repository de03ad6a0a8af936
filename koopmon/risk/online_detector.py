"""The online detector: how violently the layers' maps change from snapshot to snapshot, against what calm training
does, and what is known beforehand.

Near-unit mass alone is blind to a learning rate that is too high, and growth alone cannot decide: healthy runs grow
their update ratio too (docs/method.md). What separated our recorded runs is unsteadiness: in a healthy run the
update ratio of every layer moves smoothly, also when it takes off; under a rate that will kill the run single layers
lurch, up and down, for a step or two at a time, before the loss moves. With z_l = log(update_ratio_l + floor), the
speed of layer l is |dz_l| per optimizer step. Two quantities are taken: the peak (the fastest layer between the last
two snapshots) and the speed (the largest of the layers' running means). Each is divided by its scale, and v is their
mean; or, when that is larger, the slow mean of the peak over its own scale, since some runs die after lasting unrest
without one great lurch. Where a family's linear maps explain little of what its layers do, as those of splines, v
counts by 1 - reliability_weight * (1 - share of reliable modes).

Normalised layers fail otherwise: nothing dies, a rate that is too high ruins the run while the layers' ratios climb for
tens of steps. One batch of odd text moves their ratios for one snapshot and harms nothing. So z is there the median of
the last three snapshots, and v is divided by `normalized_scale`.

What is known beforehand (`prior`) are log-odds by the learning rate in force, against the critical rate of such layers
(`rate_excess`). They are bounded, so that evidence can always overrule them. In the risk of normalised layers they
count little, since the critical rate of large models is not known. Two scores in [0, 1] come of it, as log-odds:

    risk      4 log v + bounded prior                        acts: without a lurch it is 0, whatever the prior
    forecast  log growth of the expansive mass + prior       warns, and never acts: it may be high from the start
              or, where the script logs its loss,
              4 log(z + 0.05) + prior                        with z the loss's z-score (koopmon.risk.loss_zscore)

benchmarks/results has what each was measured to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, TypeAlias

from msgspec import Meta

from koopmon.config import RiskConfig
from koopmon.risk.loss_zscore import MIN_LOSSES, LossZScore
from koopmon.risk.normalization import normalization_from_exponent

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile


TINY_RATE, HUGE_RATE = 1e-12, 1e12
"""A rate of 0, as at the first step of a warm-up, has a logarithm too, and an infinite one a finite logarithm."""
LogRatios: TypeAlias = Annotated[tuple[Annotated[float, Meta(ge=-1000.0, le=1000.0)], ...], Meta(max_length=4096)]
"""log(update ratio + floor), one value per layer."""
EXPANSIVE_FLOOR = 0.01
"""Added to the expansive mass: growth below it counts little. One mode of 32 in one layer of 4 is 0.008."""
LOSS_FLOOR = 0.05
"""Added to the loss's z-score, which may be nothing: -12 log-odds."""


Share = Annotated[float, Meta(ge=0.0, le=1.0)]


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
    width: int | None = None
    """Of the residual stream; None where the optimizer's steps are not as long as the rate says."""
    num_layers: int = 0
    update_exponent: float | None = None
    """Of the model as it was when the run began; None where it is not known."""
    loss: float | None = None
    grad_norm: float | None = None
    lr_scale: float = 1.0
    kss_alpha: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskState:
    """What the detector remembers of one run. z is log(update ratio + floor), one value per layer.

    The bounds are checked when a history is read after a restart: it may be damaged or forged.
    """

    initial_expansive_mass: Share | None = None
    step: Annotated[int, Meta(ge=0, lt=1 << 53)] | None = None
    z: LogRatios = ()
    """After the median of normalised layers."""
    recent: Annotated[
        tuple[LogRatios, ...],
        Meta(max_length=2),
    ] = ()
    """z of the last two snapshots, before it."""
    speed: Annotated[tuple[Annotated[float, Meta(ge=0.0, le=2000.0)], ...], Meta(max_length=4096)] = ()
    """Running mean of |dz| per step, one value per layer."""
    restlessness: Annotated[float, Meta(ge=0.0, le=1.000_001)] = 0.0
    """Slow running mean of the peak, each peak counted as 1 at most."""
    lr_scale: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """koopmon's scale at the last snapshot: once it is lowered, earlier restlessness is no longer evidence."""
    surprise: LossZScore = field(default_factory=LossZScore)
    """Of the logged loss; empty where nothing is logged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineRisk:
    """`value`, the risk, and `forecast` in [0, 1]; `components` are v ("unsteadiness") and its parts, each 1 at its
    scale, the log-odds "prior" and "growth" (of the expansive mass), and, once enough losses are known, "loss", the
    z-score of the last one."""

    value: float
    reason: str
    forecast: float = 0.0
    excess_rate: float | None = None
    """The scheduled rate over the critical one of such layers; None where either is not known."""
    components: Mapping[str, float] = field(default_factory=dict)


def observe(
    profile: SpectralProfile | None,
    *,
    step: int,
    learning_rate: float | None = None,
    width: int | None = None,
    num_layers: int = 0,
    update_exponent: float | None = None,
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
        "width": width,
        "num_layers": num_layers,
        "update_exponent": update_exponent,
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


def rate_excess(observation: Observation, config: RiskConfig) -> float | None:
    """The scheduled rate, before koopmon's scale, over the rate at which the fate of such layers is even.

    None where the rate or the width is not known; a rate that is NaN is not known. Depth counts only without
    normalisation: published recipes for normalised models keep learning rate x width nearly constant while their depth
    grows tenfold. Layers that are normalised in part are placed between the two on a logarithmic scale; an unknown
    exponent counts as unnormalised.
    """
    scheduled = observation.learning_rate
    if scheduled is None or math.isnan(scheduled) or not observation.width:
        return None
    normalized = normalization(observation)
    rate = min(max(scheduled, TINY_RATE), HUGE_RATE) * observation.width
    bare = math.log10(rate * max(observation.num_layers, 1) / config.critical_rate)
    behind_norms = math.log10(rate / config.normalized_critical_rate)
    return float(10.0 ** ((1.0 - normalized) * bare + normalized * behind_norms))


def normalization(observation: Observation) -> float:
    """1 behind normalisations, 0 without, or where it is not known."""
    return 0.0 if observation.update_exponent is None else normalization_from_exponent(observation.update_exponent)


def prior(observation: Observation, config: RiskConfig) -> float:
    """Log-odds that the run fails, by what is known before it moves: the rate in force. 0 where that is not known."""
    excess = rate_excess(observation, config)
    if excess is None:
        return 0.0
    log_odds = config.prior_slope * math.log10(max(excess * observation.lr_scale, TINY_RATE))
    return min(max(log_odds, config.min_prior), config.max_prior)


def weighed(log_odds: float, observation: Observation, config: RiskConfig) -> float:
    """What of the prior counts in the risk: all of it without normalisation, `normalized_weight` at most behind it."""
    normalized = normalization(observation)
    bounded = min(max(log_odds, -config.normalized_weight), config.normalized_weight)
    return (1.0 - normalized) * log_odds + normalized * bounded


def assess(state: RiskState, observation: Observation, config: RiskConfig) -> tuple[RiskState, OnlineRisk]:
    """Score one observation against the run's own history; returns the new history and the risk."""
    state, risk = _assess(state, observation, config)
    if observation.update_exponent is None:
        return state, risk
    return state, replace(risk, excess_rate=rate_excess(observation, config))


def _assess(state: RiskState, observation: Observation, config: RiskConfig) -> tuple[RiskState, OnlineRisk]:
    if observation.non_finite:
        return state, OnlineRisk(value=1.0, forecast=1.0, reason="the residual stream is not finite")
    if not observation.informative:
        return state, OnlineRisk(value=0.0, reason=f"not informative: {observation.reason}")
    z = tuple(math.log(max(ratio, 0.0) + config.update_ratio_floor) for ratio in observation.update_ratios)
    known_layers = len(z) == len(state.z)
    before = tuple(each for each in state.recent if len(each) == len(z)) if known_layers else ()
    state = replace(_with_start_and_loss(state, observation), recent=(*before[-1:], z))
    if normalization(observation) > 0.5:
        z = _median_of_three(before, z)
    foreseen = {"prior": prior(observation, config), "growth": _growth(state, observation)}
    if len(state.surprise.losses) > MIN_LOSSES:
        foreseen["loss"] = state.surprise.value
    forecast = foresight(foreseen)
    changed = not known_layers or len(state.speed) not in (0, len(z))
    if state.step is None or observation.step <= state.step or changed:
        fresh = replace(
            state, step=observation.step, z=z, recent=state.recent[-1:], speed=(), restlessness=0.0, lr_scale=1.0
        )
        return fresh, OnlineRisk(value=0.0, forecast=forecast, reason="first snapshot", components=foreseen)
    gap = min(max(observation.step - state.step, config.min_gap_steps), config.max_gap_steps)
    latest = tuple(abs(new - old) / gap for new, old in zip(z, state.z, strict=True))
    weight = config.smoothing
    mean = state.speed or (0.0,) * len(z)
    speed = tuple((1 - weight) * old + weight * new for new, old in zip(latest, mean, strict=True))
    layer = latest.index(max(latest))
    peak, fastest = latest[layer] / config.peak_scale, max(speed) / config.speed_scale
    slow = config.restlessness_smoothing
    restless = 0.0 if observation.lr_scale < state.lr_scale else state.restlessness
    restless = (1 - slow) * restless + slow * min(peak, 1.0)
    state = replace(
        state, step=observation.step, z=z, speed=speed, restlessness=restless, lr_scale=observation.lr_scale
    )
    lasting = restless / config.restlessness_scale
    reliable = 1.0 if observation.reliable_mode_ratio is None else observation.reliable_mode_ratio
    reliability = 1.0 - config.reliability_weight * (1.0 - reliable)
    v = max(0.5 * (peak + fastest), lasting) * reliability / config.normalized_scale ** normalization(observation)
    known = weighed(foreseen["prior"], observation, config)
    reason = (
        f"unsteadiness {v:.2f} of the update ratio (peak {peak:.2f} in layer {layer}, speed {fastest:.2f}, "
        f"lasting {lasting:.2f}), prior {known:+.1f} by the rate and the layers' normalisation"
    )
    if reliability < 1.0:
        reason += f", weighed by {reliability:.2f} for its reliable modes"
    parts = {"unsteadiness": v, "peak": peak, "speed": fastest, "lasting": lasting, **foreseen}
    value = _sigmoid(4.0 * math.log(v) + known) if v > 0.0 else 0.0
    return state, OnlineRisk(value=value, forecast=forecast, reason=reason, components=parts)


def _median_of_three(before: tuple[tuple[float, ...], ...], z: tuple[float, ...]) -> tuple[float, ...]:
    """Of each layer over this snapshot and the two before it; `z` as it is while there are not as many."""
    if len(before) < 2:
        return z
    return tuple(sorted(values)[1] for values in zip(*before, z, strict=True))


def _with_start_and_loss(state: RiskState, observation: Observation) -> RiskState:
    """`state`, with what the first informative snapshot said kept for good, and the loss beside this one."""
    state = replace(state, surprise=state.surprise.after(observation.loss))
    if state.initial_expansive_mass is not None:
        return state
    return replace(state, initial_expansive_mass=observation.expansive_mass)


def _growth(state: RiskState, observation: Observation) -> float:
    """Of the expansive mass since the start, as a logarithm."""
    now, first = observation.expansive_mass, state.initial_expansive_mass
    if now is None or first is None:
        return 0.0
    return math.log((now + EXPANSIVE_FLOOR) / (first + EXPANSIVE_FLOOR))


def foresight(foreseen: Mapping[str, float]) -> float:
    """The forecast that follows from the components "prior" and "growth" or "loss".

    By the loss where there is one: with the prior it warned earlier than the expansive mass, and of more runs.
    """
    if "loss" in foreseen:
        return _sigmoid(foreseen["prior"] + 4.0 * math.log(max(foreseen["loss"], 0.0) + LOSS_FLOOR))
    return _sigmoid(foreseen["prior"] + foreseen["growth"])


def _sigmoid(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-min(max(log_odds, -50.0), 50.0)))
