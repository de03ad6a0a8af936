"""Online detector: risk and forecast of a run from the changes between its snapshots and from its learning rate.

The detector is ours (docs/method.md, "Online detector"). In a healthy run the update ratio of every layer changes
smoothly, even while it grows. At a learning rate that kills the run, single layers jump up and down for a step or two
before the loss moves. Near-unit mass does not show a rate that is too high. Growth alone decides nothing, because
the update ratio of healthy runs grows too.

With z_l = log(update_ratio_l + floor), the speed of layer l is |dz_l| per optimizer step. The detector computes:

    peak      largest speed of a layer between the last two snapshots, over `peak_scale`
    speed     largest running mean of a layer's speed, over `speed_scale`
    lasting   slow running mean of the peak, over `restlessness_scale`; some runs die without one large jump
    v         max((peak + speed) / 2, lasting): the unsteadiness

Where linear maps explain little of the layers, as with splines, v is multiplied by
1 - reliability_weight * (1 - share of reliable modes). Of few tokens, update ratios vary by chance: v is multiplied by
(N / ENOUGH_TOKENS)^2 for N tokens, below ENOUGH_TOKENS.

Normalised layers fail in another way. A rate that is too high ruins the run while the update ratios climb for tens of
steps. One batch of unusual text moves the ratios for one snapshot and harms nothing. For normalised layers z is
therefore the median of the last three snapshots, and v is divided by `normalized_scale`.

`prior` gives log-odds from the learning rate in force and the critical rate of such layers (`rate_excess`). Its bounds
let evidence overrule it. It counts little in the risk of normalised layers, because the critical rate of large models
is not known. Two scores in [0, 1] follow, as log-odds:

    risk      4 log v + bounded prior                        The policy acts on it. It is 0 without any change.
    forecast  log growth of the expansive mass + prior       It warns and starts no action.
              4 log(z + 0.05) + prior                        The same with the loss's z-score z, where a loss is known.

Attention logits can grow while the update ratios stay smooth. For normalised layers at a rate above the critical one,
the risk is therefore at least the logistic function of 4 log g, with g from `koopmon.risk.logit_growth`.

A new model at its full rate is damaged within the first steps, before the jumps show. For normalised layers the same
function of the growth since the first snapshot (`koopmon.risk.start_growth`) is therefore a lower bound too, once that
growth is 1, at a rate below the critical one. So is that of the fall of the largest spectral radius
(`koopmon.risk.radius_fall`), once it is 1: blocks that overwrite the stream learn nothing more.

The measured results are in benchmarks/results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, TypeAlias

from msgspec import Meta

from koopmon.config import RiskConfig
from koopmon.numbers import to_single
from koopmon.risk import causes
from koopmon.risk.logit_growth import LogitGrowth
from koopmon.risk.loss_zscore import MIN_LOSSES, LossZScore
from koopmon.risk.normalization import normalization_from_exponent
from koopmon.risk.radius_fall import RadiusFall
from koopmon.risk.start_growth import EXPLAINS, LEAST_EXCESS, StartGrowth
from koopmon.wire.messages import AtStep, TrainingStep

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile


TINY_RATE, HUGE_RATE = 1e-12, 1e12
"""Bounds of a learning rate. They keep its logarithm finite, for example at rate 0 in the first step of a warm-up."""
LogRatios: TypeAlias = Annotated[tuple[Annotated[float, Meta(ge=-1000.0, le=1000.0)], ...], Meta(max_length=4096)]
"""log(update ratio + floor), one value per layer."""
EXPANSIVE_FLOOR = 0.01
"""Term added to the expansive mass: growth below it counts little. One mode of 32 in one layer of 4 is 0.008."""
LOSS_FLOOR = 0.05
"""Term added to the loss's z-score. A z-score of 0 then gives 4 log(0.05) = -12 log-odds. Chosen by hand."""
ENOUGH_TOKENS = 64
"""Number of tokens of a snapshot whose unsteadiness counts in full. Of fewer ones, update ratios vary by chance."""


Share = Annotated[float, Meta(ge=0.0, le=1.0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation(AtStep):
    """Measurements of one snapshot: means over layers, the update ratio of each layer, and scalars of the training.

    Absent scalars are None.
    """

    training: TrainingStep
    informative: bool
    """True when the profile is informative."""
    reason: str = ""
    """Reason against an informative profile."""
    non_finite: bool = False
    """True when the states hold NaN or infinity: the run has diverged."""
    update_ratios: tuple[float, ...] = ()
    """Update ratio of each layer, by depth. It and the radii are float32, so that a history keeps every digit."""
    spectral_radii: tuple[float, ...] = ()
    """Spectral radius of each layer, by depth."""
    near_unit_mass: float | None = None
    expansive_mass: float | None = None
    spectral_radius: float | None = None
    max_spectral_radius: float | None = None
    """Largest of `spectral_radii`. Histories of koopmon 0.2 have it without them."""
    update_ratio: float | None = None
    nonlinearity_ratio: float | None = None
    reliable_mode_ratio: float | None = None
    width: int | None = None
    """Width of the residual stream; None where the optimizer's step length is not given by the learning rate."""
    num_tokens: int = ENOUGH_TOKENS
    """Number of tokens of the snapshot."""
    num_layers: int = 0
    update_exponent: float | None = None
    """Update exponent of the model at the start of the run; None where it is unknown."""
    rewinds: bool = False
    """True when the agents can go back to a copy of the weights."""
    max_attention_logit: float | None = None
    """Largest value of the observable of this name over the layers."""
    max_attention_layer: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RiskState:
    """History of one run for the detector. z is log(update ratio + floor), one value for each layer.

    The bounds are checked when the monitor reads a history after a restart, because the file may be damaged or forged.
    """

    initial_expansive_mass: Share | None = None
    step: Annotated[int, Meta(ge=0, lt=1 << 53)] | None = None
    z: LogRatios = ()
    """z of the last snapshot, after the median of three for normalised layers."""
    recent: Annotated[
        tuple[LogRatios, ...],
        Meta(max_length=2),
    ] = ()
    """z of the last two snapshots, before that median, oldest first."""
    speed: Annotated[tuple[Annotated[float, Meta(ge=0.0, le=2000.0)], ...], Meta(max_length=4096)] = ()
    """Running mean of |dz| per step, one value for each layer."""
    restlessness: Annotated[float, Meta(ge=0.0, le=1.000_001)] = 0.0
    """Slow running mean of the peak; a peak counts as 1 at most."""
    lr_scale: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """koopmon's LR scale at the last snapshot. A lower scale resets `restlessness`."""
    surprise: LossZScore = field(default_factory=LossZScore)
    """z-score of the loss; without losses where none is known."""
    update_rms: Annotated[tuple[Annotated[float, Meta(ge=0.0)], ...], Meta(max_length=causes.NUM_UPDATES)] = ()
    """Update RMS of the last snapshots, oldest first."""
    logits: LogitGrowth = field(default_factory=LogitGrowth)
    """Growth of the largest attention logit; without logits where none is known."""
    start: StartGrowth = field(default_factory=StartGrowth)
    """Growth of the update ratios since the first snapshot."""
    radius_fall: RadiusFall = field(default_factory=RadiusFall)
    """Fall of the largest spectral radius since the start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineRisk:
    """Risk and forecast of one snapshot."""

    value: float
    """Risk, in [0, 1]."""
    reason: str
    """Reason for the risk, in one line."""
    forecast: float = 0.0
    """Forecast, in [0, 1]."""
    causes: tuple[str, ...] = ()
    """Names of the causes that a signal shows (`koopmon.risk.causes`); `reason` has their words."""
    excess_rate: float | None = None
    """Scheduled rate over the critical rate of such layers; None where either is unknown."""
    components: Mapping[str, float] = field(default_factory=dict)
    """Parts of the scores, by name.

    "unsteadiness" is v; "peak", "speed" and "lasting" are its parts, each 1 at its scale. "prior" and "growth" (of the
    expansive mass) are log-odds. "loss" is the z-score of the newest loss, once enough losses are known.
    """


def observe(
    profile: SpectralProfile | None,
    training: TrainingStep,
    *,
    width: int | None = None,
    num_layers: int = 0,
    update_exponent: float | None = None,
    rewinds: bool = False,
    non_finite: bool = False,
    attention_logits: Sequence[float | None] = (),
) -> Observation:
    """Reduce a profile to an observation for the detector and the policy.

    Args:
        profile: the profile; None when the states were not finite.
        training: scalars of the training at the snapshot.
        width: width of the residual stream; None where the learning rate does not give the step length.
        num_layers: number of transitions.
        update_exponent: update exponent at the start of the run; None where it is unknown.
        rewinds: True when the agents can go back to a copy of the weights.
        non_finite: True when the states hold NaN or infinity.
        attention_logits: the observable `max_attention_logit` of each layer; None where it is unknown.
    """
    logits = {layer: value for layer, value in enumerate(attention_logits) if value is not None}
    layer_of_logit = max(logits, key=logits.__getitem__, default=None)
    known = Observation(
        training=training,
        informative=False,
        width=width,
        num_layers=num_layers,
        update_exponent=update_exponent,
        rewinds=rewinds,
        max_attention_logit=None if layer_of_logit is None else logits[layer_of_logit],
        max_attention_layer=layer_of_logit,
    )
    if profile is None or non_finite:
        reason = "the states are not finite" if non_finite else "no profile"
        return replace(known, reason=reason, non_finite=non_finite)
    ratios = to_single(layer.update_ratio for layer in profile.layers)
    if not profile.informative:
        return replace(known, reason=profile.reason, update_ratios=ratios)
    radii = to_single(layer.spectral_radius for layer in profile.layers)
    return replace(
        known,
        informative=True,
        num_tokens=profile.num_samples,
        update_ratios=ratios,
        spectral_radii=radii,
        near_unit_mass=profile.mean("near_unit_mass"),
        expansive_mass=profile.mean("expansive_mass"),
        spectral_radius=profile.mean("spectral_radius"),
        max_spectral_radius=max(radii),
        update_ratio=profile.mean("update_ratio"),
        nonlinearity_ratio=profile.mean("nonlinearity_ratio"),
        reliable_mode_ratio=profile.mean("reliable_mode_ratio"),
    )


def rate_excess(observation: Observation, config: RiskConfig) -> float | None:
    """Compute the scheduled rate over the critical rate, at which the prior is even.

    The scheduled rate is the rate before koopmon's scale. Partly normalised layers lie between the two critical rates
    on a logarithmic scale. An unknown exponent counts as unnormalised.

    Returns:
        The excess, positive; None where the rate or the width is unknown or the rate is NaN.
    """
    scheduled = observation.training.learning_rate
    if scheduled is None or math.isnan(scheduled) or not observation.width:
        return None
    normalized = normalization(observation)
    rate = min(max(scheduled, TINY_RATE), HUGE_RATE) * observation.width
    # Depth counts without normalisation only. Published recipes for normalised models keep learning rate x width
    # between 0.3 and 1.6 while learning rate x depth grows from 5 to 70.
    bare = math.log10(rate * max(observation.num_layers, 1) / config.critical_rate)
    behind_norms = math.log10(rate / config.normalized_critical_rate)
    return float(10.0 ** ((1.0 - normalized) * bare + normalized * behind_norms))


def normalization(observation: Observation) -> float:
    """Compute the normalisation strength in [0, 1]; 0 where the update exponent is unknown."""
    return 0.0 if observation.update_exponent is None else normalization_from_exponent(observation.update_exponent)


def prior(observation: Observation, config: RiskConfig) -> float:
    """Compute the log-odds of failure from the rate in force, within [min_prior, max_prior]; 0 where it is unknown."""
    excess = rate_excess(observation, config)
    if excess is None:
        return 0.0
    log_odds = config.prior_slope * math.log10(max(excess * observation.training.lr_scale, TINY_RATE))
    return min(max(log_odds, config.min_prior), config.max_prior)


def weighed(log_odds: float, observation: Observation, config: RiskConfig) -> float:
    """Weigh the prior for the risk: the whole prior without normalisation, at most `normalized_weight` behind it."""
    normalized = normalization(observation)
    bounded = min(max(log_odds, -config.normalized_weight), config.normalized_weight)
    return (1.0 - normalized) * log_odds + normalized * bounded


def assess(state: RiskState, observation: Observation, config: RiskConfig) -> tuple[RiskState, OnlineRisk]:
    """Score one observation against the run's own history.

    Returns:
        The new history and the risk. Non-finite states give risk and forecast 1, a profile that is not informative 0;
        both leave the history unchanged. The first snapshot gives risk 0.
    """
    found = causes.find(observation, state.update_rms)
    state, risk = _assess(state, observation, config)
    update_rms = observation.training.update_rms
    if update_rms is not None:
        state = replace(state, update_rms=causes.remember(state.update_rms, update_rms))
    if observation.informative:
        # A history that was read may hold a larger logarithm than exp can take.
        ratios = tuple(max(math.exp(min(each, 700.0)) - config.update_ratio_floor, 0.0) for each in state.z)
        state = replace(
            state,
            logits=state.logits.after(observation.step, observation.max_attention_logit),
            start=state.start.after(observation.step, observation.training.learning_rate, ratios),
            radius_fall=state.radius_fall.after(observation.max_spectral_radius),
        )
        if normalization(observation) > 0.5:
            risk = _with_bounds(state, observation, risk, found)
    if found:
        risk = replace(risk, causes=tuple(found), reason="; ".join((*found.values(), risk.reason)))
    return state, risk


def _with_bounds(state: RiskState, observation: Observation, risk: OnlineRisk, found: dict[str, str]) -> OnlineRisk:
    """Return the risk of normalised layers, with its lower bounds. Their causes are added to `found`."""
    if (grown := _risk_of_logits(state, observation, risk)) > risk.value:
        risk = replace(risk, value=grown)
        if state.logits.value >= 1.0:
            found.setdefault("attention", causes.grown_logits(observation, state.logits.value))
    if state.start.value >= EXPLAINS and LEAST_EXCESS <= (risk.excess_rate or 0.0) < 1.0:
        found["warmup"] = causes.grown_ratios(observation, state.start)
        if state.start.value >= 1.0:
            risk = replace(risk, value=max(risk.value, _risk_of_growth(state.start.value)))
    if state.radius_fall.value > 0.0:
        risk = replace(risk, value=max(risk.value, _risk_of_growth(state.radius_fall.value)))
        found["overwritten"] = causes.overwritten(observation, state.radius_fall.level)
    return risk


def _risk_of_logits(state: RiskState, observation: Observation, risk: OnlineRisk) -> float:
    """Compute the risk from the growth of the attention logits of normalised layers, in [0, 1].

    It is 0 unless the rate in force is above the critical one: logits of healthy runs grow too.
    """
    excess = risk.excess_rate
    if excess is None or excess * observation.training.lr_scale < 1.0:
        return 0.0
    return _risk_of_growth(state.logits.value)


def _risk_of_growth(growth: float) -> float:
    return _sigmoid(4.0 * math.log(growth)) if growth > 0.0 else 0.0


def _assess(state: RiskState, observation: Observation, config: RiskConfig) -> tuple[RiskState, OnlineRisk]:
    """Score one observation, without its causes."""
    excess = None if observation.update_exponent is None else rate_excess(observation, config)
    if observation.non_finite:
        broken = "the residual stream is not finite"
        return state, OnlineRisk(value=1.0, forecast=1.0, reason=broken, excess_rate=excess)
    if not observation.informative:
        return state, OnlineRisk(value=0.0, reason=f"not informative: {observation.reason}", excess_rate=excess)
    # The floor makes changes of small update ratios count little: log is nearly flat below it.
    z = tuple(math.log(max(ratio, 0.0) + config.update_ratio_floor) for ratio in observation.update_ratios)
    state = _with_start_and_loss(state, observation)
    foreseen = {"prior": prior(observation, config), "growth": _growth(state, observation)}
    if len(state.surprise.losses) > MIN_LOSSES:
        foreseen["loss"] = state.surprise.value
    forecast = foresight(foreseen)
    changed = len(z) != len(state.z) or len(state.speed) not in (0, len(z))
    # Steps that go back mean a new start from a checkpoint, and other layers mean another model. A difference to the
    # last snapshot has no meaning in both cases.
    if state.step is None or observation.step <= state.step or changed:
        fresh = RiskState(
            initial_expansive_mass=state.initial_expansive_mass,
            step=observation.step,
            z=z,
            recent=(z,),
            surprise=state.surprise,
            update_rms=state.update_rms,
        )
        first = "first snapshot"
        return fresh, OnlineRisk(value=0.0, forecast=forecast, reason=first, excess_rate=excess, components=foreseen)
    before = tuple(each for each in state.recent if len(each) == len(z))
    recent = (*before[-1:], z)
    if normalization(observation) > 0.5:
        z = _median_of_three(before, z)
    # The gap has a lower bound because sampling noise does not shrink with it. It has an upper bound because an
    # oscillation does not grow with it.
    gap = min(max(observation.step - state.step, config.min_gap_steps), config.max_gap_steps)
    latest = tuple(abs(new - old) / gap for new, old in zip(z, state.z, strict=True))
    weight = config.smoothing
    mean = state.speed or (0.0,) * len(z)
    speed = tuple((1 - weight) * old + weight * new for new, old in zip(latest, mean, strict=True))
    layer = latest.index(max(latest))
    peak, fastest = latest[layer] / config.peak_scale, max(speed) / config.speed_scale
    slow = config.restlessness_smoothing
    # After a lower LR scale the earlier restlessness is no evidence about the rate in force.
    restless = 0.0 if observation.training.lr_scale < state.lr_scale else state.restlessness
    # A peak counts as 1 at most, so that one large jump does not last.
    restless = (1 - slow) * restless + slow * min(peak, 1.0)
    state = RiskState(
        initial_expansive_mass=state.initial_expansive_mass,
        step=observation.step,
        z=z,
        recent=recent,
        speed=speed,
        restlessness=restless,
        lr_scale=observation.training.lr_scale,
        surprise=state.surprise,
        update_rms=state.update_rms,
        logits=state.logits,
        start=state.start,
        radius_fall=state.radius_fall,
    )
    lasting = restless / config.restlessness_scale
    reliable = 1.0 if observation.reliable_mode_ratio is None else observation.reliable_mode_ratio
    reliability = 1.0 - config.reliability_weight * (1.0 - reliable)
    sampled = min(observation.num_tokens / ENOUGH_TOKENS, 1.0) ** 2
    # The exponent b = normalisation strength interpolates the scale between 1 and `normalized_scale` on a log scale.
    v = (
        max(0.5 * (peak + fastest), lasting)
        * reliability
        * sampled
        / config.normalized_scale ** normalization(observation)
    )
    known = weighed(foreseen["prior"], observation, config)
    reason = (
        f"unsteadiness {v:.2f} of the update ratio (peak {peak:.2f} in layer {layer}, speed {fastest:.2f}, "
        f"lasting {lasting:.2f}), prior {known:+.1f} by the rate and the layers' normalisation"
    )
    if reliability < 1.0:
        reason += f", weighed by {reliability:.2f} for its reliable modes"
    if sampled < 1.0:
        reason += f", weighed by {sampled:.2f} for its {observation.num_tokens} tokens"
    parts = {"unsteadiness": v, "peak": peak, "speed": fastest, "lasting": lasting, **foreseen}
    # 4 log v is the log-odds of v^4 / (v^4 + 1): one half at v = 1 and an even prior. The 4 was chosen by hand.
    value = _sigmoid(4.0 * math.log(v) + known) if v > 0.0 else 0.0
    return state, OnlineRisk(value=value, forecast=forecast, reason=reason, excess_rate=excess, components=parts)


def _median_of_three(before: tuple[tuple[float, ...], ...], z: tuple[float, ...]) -> tuple[float, ...]:
    """Compute the median of each layer over this snapshot and the last two; return `z` with fewer than two of them."""
    if len(before) < 2:
        return z
    return tuple(sorted(values)[1] for values in zip(*before, z, strict=True))


def _with_start_and_loss(state: RiskState, observation: Observation) -> RiskState:
    """Add the loss of this snapshot, and the expansive mass if this is the first informative one."""
    first = state.initial_expansive_mass
    return RiskState(
        initial_expansive_mass=observation.expansive_mass if first is None else first,
        step=state.step,
        z=state.z,
        recent=state.recent,
        speed=state.speed,
        restlessness=state.restlessness,
        lr_scale=state.lr_scale,
        surprise=state.surprise.after(observation.training.loss),
        update_rms=state.update_rms,
        logits=state.logits,
        start=state.start,
        radius_fall=state.radius_fall,
    )


def _growth(state: RiskState, observation: Observation) -> float:
    """Compute the logarithm of the growth of the expansive mass since the first informative snapshot."""
    now, first = observation.expansive_mass, state.initial_expansive_mass
    if now is None or first is None:
        return 0.0
    return math.log((now + EXPANSIVE_FLOOR) / (first + EXPANSIVE_FLOOR))


def foresight(foreseen: Mapping[str, float]) -> float:
    """Compute the forecast in [0, 1] from the components "prior" and "loss", or "growth" where no loss is known.

    With the prior, the loss warned earlier than the expansive mass and of more runs (docs/evidence.md).
    """
    if "loss" in foreseen:
        return _sigmoid(foreseen["prior"] + 4.0 * math.log(max(foreseen["loss"], 0.0) + LOSS_FLOOR))
    return _sigmoid(foreseen["prior"] + foreseen["growth"])


def _sigmoid(log_odds: float) -> float:
    """Compute the probability of log-odds. The bound of 50 keeps exp finite and was chosen by hand."""
    return 1.0 / (1.0 + math.exp(-min(max(log_odds, -50.0), 50.0)))
