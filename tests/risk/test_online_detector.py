"""Online detector: smooth growth scores low, jumping layers score high, and the bounds hold for any input."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from koopmon.config import RiskConfig
from koopmon.numbers import to_single
from koopmon.risk.logit_growth import GROWTH, LogitGrowth
from koopmon.risk.loss_zscore import MIN_LOSSES
from koopmon.risk.online_detector import (
    LOSS_FLOOR,
    Observation,
    OnlineRisk,
    RiskState,
    assess,
    foresight,
    observe,
    prior,
    rate_excess,
    weighed,
)
from koopmon.risk.radius_fall import FALL
from koopmon.spectral import SpectralProfile, profile_states
from koopmon.wire.messages import TrainingStep
from tests.factories import observation

CONFIG = RiskConfig()


def seen(step: int, ratios: tuple[float, ...], exponent: float = 1.0, **fields: Any) -> Observation:
    return observation(step, update_ratios=ratios, update_exponent=exponent, **fields)


def follow(series: list[tuple[int, tuple[float, ...]]], exponent: float = 1.0, **fields: Any) -> list[OnlineRisk]:
    state, risks = RiskState(), []
    for step, ratios in series:
        state, risk = assess(state, seen(step, ratios, exponent, **fields), CONFIG)
        risks.append(risk)
    return risks


def test_smooth_growth_by_a_hundredfold_is_calm() -> None:
    series = [(step, (0.04 * 1.05**step, 0.05 * 1.05**step)) for step in range(95)]
    assert max(risk.value for risk in follow(series)) < 0.05


def test_a_jump_of_one_layer_for_one_step_is_an_alarm() -> None:
    calm = [(step, (0.5, 0.6, 0.7, 0.7)) for step in range(20)]
    flare = [(20, (0.5, 0.6, 0.7, 20.8)), (21, (0.5, 0.6, 0.7, 0.3))]
    risks = follow(calm + flare)
    assert risks[19].value == 0.0
    assert risks[20].value > 0.9
    assert "layer 3" in risks[20].reason
    assert risks[21].value > 0.9


def test_many_small_jumps_are_an_alarm_until_a_back_off() -> None:
    jumps = [(step, (2.0 if step % 2 else 3.2,)) for step in range(60)]
    risks = follow(jumps)
    assert max(risk.value for risk in risks[:5]) < 0.5
    assert risks[-1].value > 0.5
    assert risks[-1].components["lasting"] > 1 > (risks[-1].components["peak"] + risks[-1].components["speed"]) / 2
    state = RiskState()
    for step, ratios in jumps:
        state, _ = assess(state, seen(step, ratios), CONFIG)
    state, after = assess(state, seen(60, (3.2,), lr_scale=0.5), CONFIG)
    assert after.value < 0.5
    assert state.restlessness < 0.1


JUMP = [(0, (1.0, 1.0)), (1, (1.0, 3.0)), (2, (1.0, 1.0))]


def log_odds(probability: float) -> float:
    return math.log(probability / (1 - probability))


def at_rate(rate: float | None, exponent: float | None = 1.0, **fields: Any) -> Observation:
    """Observe a learning rate in a model of width 10 with 4 layers."""
    return observation(0, learning_rate=rate, width=10, num_layers=4, update_exponent=exponent, **fields)


@pytest.mark.parametrize(
    ("exponent", "critical"),
    [(1.0, CONFIG.critical_rate / 40), (None, CONFIG.critical_rate / 40), (0.0, CONFIG.normalized_critical_rate / 10)],
    ids=["unnormalised", "unknown", "normalised: depth does not count"],
)
def test_the_prior_rises_with_the_rate_within_its_bounds(exponent: float | None, critical: float) -> None:
    found = [prior(at_rate(rate, exponent), CONFIG) for rate in (0.0, 1e-9, critical / 2, critical, 2 * critical, 1e6)]
    assert found == sorted(found)
    assert found[0] == found[1] == CONFIG.min_prior
    assert found[3] == pytest.approx(0.0, abs=1e-9)
    assert found[-1] == CONFIG.max_prior
    assert found[3] - found[2] == pytest.approx(CONFIG.prior_slope * math.log10(2))


@pytest.mark.parametrize("fields", [{"learning_rate": None}, {"width": None}, {"width": 0}])
def test_an_unknown_rate_says_nothing(fields: dict[str, Any]) -> None:
    case = observation(0, **{"learning_rate": 1.0, "width": 10, "num_layers": 4, "update_exponent": 1.0, **fields})
    assert prior(case, CONFIG) == 0.0
    assert rate_excess(case, CONFIG) is None


def test_excess_uses_the_scheduled_rate() -> None:
    whole, halved = (rate_excess(at_rate(0.3, lr_scale=scale), CONFIG) for scale in (1.0, 0.5))
    assert whole == halved == pytest.approx(0.3 * 40 / CONFIG.critical_rate)
    bare, behind_norms = (rate_excess(at_rate(0.3, exponent), CONFIG) for exponent in (1.0, 0.0))
    partly = rate_excess(at_rate(0.3, 0.3), CONFIG)
    assert bare is not None
    assert behind_norms == pytest.approx(0.3 * 10 / CONFIG.normalized_critical_rate)
    assert partly == pytest.approx(math.sqrt(bare * behind_norms)), "half way between the two"
    _, unknown = assess(RiskState(), replace(at_rate(3.0, None), update_ratios=(1.0,)), CONFIG)
    assert unknown.excess_rate is None, "the critical rate of these layers is unknown"


def test_the_prior_uses_the_rate_in_force() -> None:
    whole, halved = (prior(at_rate(0.02, lr_scale=scale), CONFIG) for scale in (1.0, 0.5))
    assert whole - halved == pytest.approx(CONFIG.prior_slope * math.log10(2))


CLIMB = [(step, (0.5 * 1.8**step, 0.6)) for step in range(12)]
"""Update ratios of a run in which one layer dominates the stream."""


def test_evidence_overrules_the_rate_for_normalised_layers() -> None:
    low, high = (follow(CLIMB, 0.0, learning_rate=rate, width=10)[-1] for rate in (1e-9, 1.0))
    assert log_odds(high.value) - log_odds(low.value) == pytest.approx(2 * CONFIG.normalized_weight)
    assert low.components["prior"] == CONFIG.min_prior, "the forecast uses the whole prior"
    bare = [follow(CLIMB, learning_rate=rate, width=10)[-1] for rate in (1e-9, 1.0)]
    assert log_odds(bare[1].value) - log_odds(bare[0].value) == pytest.approx(CONFIG.max_prior - CONFIG.min_prior)


@pytest.mark.parametrize(("exponent", "factor"), [(0.0, 0.5), (1.0, 1.0)])
def test_normalised_layers_have_their_own_scale(exponent: float, factor: float) -> None:
    found = []
    for config in (CONFIG, RiskConfig(normalized_scale=2 * CONFIG.normalized_scale)):
        state = RiskState()
        for step, ratios in CLIMB:
            state, risk = assess(state, seen(step, ratios, exponent), config)
        found.append(risk.components["unsteadiness"])
    assert found[0] > 0.0
    assert found[1] == pytest.approx(factor * found[0])


def test_a_climb_of_normalised_layers_is_an_alarm() -> None:
    slow = [(step, (0.5 * 1.02**step, 0.6)) for step in range(60)]
    assert follow(CLIMB, 0.0)[-1].value > 0.4
    assert max(risk.value for risk in follow(slow, 0.0)) < 0.05


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("height", [2.0, 5.0, 20.0])
def test_one_unusual_snapshot_of_normalised_layers_is_no_alarm(layer: int, height: float) -> None:
    series = [(step, (0.5, 0.6)) for step in range(20)]
    odd = tuple(ratio * (height if index == layer else 1.0) for index, ratio in enumerate((0.5, 0.6)))
    series[10] = (10, odd)  # type: ignore[assignment]
    assert max(risk.value for risk in follow(series, 0.0)) == 0.0
    if height > 2.0:
        assert max(risk.value for risk in follow(series)) > 0.4, "without normalisation it is one"


def test_without_a_change_the_risk_is_zero_at_any_prior() -> None:
    risks = follow([(step, (1.0, 1.0)) for step in range(30)], learning_rate=1e6, width=1)
    assert max(risk.value for risk in risks) == 0.0
    assert risks[0].forecast == pytest.approx(1 / (1 + math.exp(-CONFIG.max_prior))), "but there is a warning"


def test_the_forecast_rises_with_the_expansive_mass() -> None:
    state, forecasts = RiskState(), []
    for step, mass in enumerate((0.02, 0.02, 0.1, 0.5, 0.02)):
        state, risk = assess(state, seen(step, (1.0,), expansive_mass=mass), CONFIG)
        forecasts.append(risk.forecast)
    assert forecasts[0] == forecasts[1] == forecasts[4] == 0.5
    assert 0.5 < forecasts[2] < forecasts[3]
    assert log_odds(forecasts[3]) == pytest.approx(math.log(0.51 / 0.03))


def test_the_forecast_uses_a_logged_loss() -> None:
    losses = [3.0 + 0.01 * (step % 3) for step in range(12)] + [3.2]
    plain, told = RiskState(), RiskState()
    for step, loss in enumerate(losses):
        plain, without = assess(plain, seen(step, (1.0,), learning_rate=0.9, width=1, expansive_mass=0.1), CONFIG)
        told, with_loss = assess(
            told, seen(step, (1.0,), learning_rate=0.9, width=1, expansive_mass=0.1, loss=loss), CONFIG
        )
        assert ("loss" in with_loss.components) == (step >= MIN_LOSSES), "before, the forecast uses the expansive mass"
        if step < MIN_LOSSES:
            assert with_loss.forecast == without.forecast
    known, z = with_loss.components["prior"], with_loss.components["loss"]
    assert z > 10
    assert with_loss.forecast == pytest.approx(1 / (1 + math.exp(-known - 4 * math.log(z + LOSS_FLOOR))))
    assert with_loss.forecast > 0.99 > 0.5 > without.forecast
    assert with_loss.value == without.value == 0.0, "a loss alone is no reason to act"
    told, fallen = assess(told, seen(13, (1.0,), learning_rate=0.9, width=1, loss=2.9), CONFIG)
    assert fallen.forecast < 0.01


@given(reliable=st.floats(0, 1), weight=st.floats(0, 1))
def test_reliability_weight_scales_the_unsteadiness(reliable: float, weight: float) -> None:
    config = RiskConfig(reliability_weight=weight)
    before, _ = assess(RiskState(), seen(0, (1.0, 1.0)), CONFIG)
    jump = seen(1, (1.0, 3.0))
    _, plain = assess(before, jump, CONFIG)
    _, same = assess(before, replace(jump, reliable_mode_ratio=reliable), CONFIG)
    _, weighed = assess(before, replace(jump, reliable_mode_ratio=reliable), config)
    assert same.value == plain.value, "no other family is touched"
    factor = 1 - weight * (1 - reliable)
    assert weighed.components["unsteadiness"] == pytest.approx(plain.components["unsteadiness"] * factor)
    assert ("reliable modes" in weighed.reason) == (factor < 1)


def test_components_match_their_definition() -> None:
    ratios = [(0.1, 0.3), (0.4, 0.2), (0.5, 1.5)]
    risk = follow([(2 * i, r) for i, r in enumerate(ratios)])[-1]
    z = [[math.log(u + CONFIG.update_ratio_floor) for u in r] for r in ratios]
    first = [abs(b - a) / 2 for a, b in zip(z[0], z[1], strict=True)]
    second = [abs(b - a) / 2 for a, b in zip(z[1], z[2], strict=True)]
    w = CONFIG.smoothing
    speed = max((1 - w) * w * a + w * b for a, b in zip(first, second, strict=True)) / CONFIG.speed_scale
    peak = max(second) / CONFIG.peak_scale
    slow, peaks = CONFIG.restlessness_smoothing, [max(first) / CONFIG.peak_scale, peak]
    lasting = ((1 - slow) * slow * min(peaks[0], 1) + slow * min(peaks[1], 1)) / CONFIG.restlessness_scale
    assert risk.components["lasting"] == pytest.approx(lasting)
    v = max((peak + speed) / 2, lasting)
    assert risk.components["peak"] == pytest.approx(peak)
    assert risk.components["speed"] == pytest.approx(speed)
    assert risk.value == pytest.approx(v**4 / (1 + v**4))


def test_a_sparse_cadence_does_not_hide_an_oscillation() -> None:
    dense = follow([(step, (1.0 if step % 2 else 4.0,)) for step in range(12)])
    sparse = follow([(10 * step, (1.0 if step % 2 else 4.0,)) for step in range(12)])
    assert sparse[-1].components["peak"] == pytest.approx(
        dense[-1].components["peak"] * CONFIG.min_gap_steps / CONFIG.max_gap_steps
    )


def test_non_finite_states_have_risk_one_and_keep_the_history() -> None:
    state, _ = assess(RiskState(), seen(0, (0.1,)), CONFIG)
    after, risk = assess(state, Observation(training=TrainingStep(step=1), informative=False, non_finite=True), CONFIG)
    assert risk.value == 1.0
    assert after == state


def test_an_identity_initialisation_is_no_risk() -> None:
    still = Observation(
        training=TrainingStep(step=3), informative=False, reason="layers do not move", update_ratios=(0.0,)
    )
    state, risk = assess(RiskState(), still, CONFIG)
    assert risk.value == 0.0
    assert "layers do not move" in risk.reason
    assert state.initial_expansive_mass is None


@pytest.mark.parametrize("again", [seen(5, (0.1,)), seen(3, (0.1,)), seen(6, (0.1, 0.2))])
def test_an_earlier_step_or_another_depth_resets_the_history(again: Observation) -> None:
    state, _ = assess(RiskState(), seen(5, (9.0,)), CONFIG)
    state, risk = assess(state, again, CONFIG)
    assert risk.value == 0.0
    assert len(state.z) == len(again.update_ratios)


@given(
    st.lists(st.tuples(st.floats(0, 1e30), st.floats(0, 1e30)), min_size=1, max_size=12),
    st.floats(0, 1),
    st.integers(1, 100),
)
def test_the_risk_is_always_a_probability(ratios: list[tuple[float, float]], share: float, gap: int) -> None:
    for risk in follow([(i * gap, r) for i, r in enumerate(ratios)], share, learning_rate=gap * share, width=1):
        assert 0.0 <= risk.value <= 1.0
        assert 0.0 <= risk.forecast <= 1.0
        assert all(math.isfinite(value) for value in risk.components.values())


def test_observations_are_frozen_copies() -> None:
    first = seen(0, (0.1,))
    assert replace(first, informative=False) != first


def test_the_excess_is_one_at_the_critical_rate_of_the_configuration() -> None:
    config = RiskConfig(critical_rate=3.0, normalized_critical_rate=0.7)
    assert rate_excess(at_rate(3.0 / 40), config) == pytest.approx(1.0)
    assert rate_excess(at_rate(0.7 / 10, 0.0), config) == pytest.approx(1.0)
    flat = replace(at_rate(0.6), num_layers=0)
    assert rate_excess(flat, config) == pytest.approx(0.6 * 10 / 3.0), "a model of unknown depth has one layer"
    _, risk = assess(RiskState(), replace(at_rate(0.6), update_ratios=(1.0,)), config)
    assert risk.excess_rate == rate_excess(at_rate(0.6), config)
    assert rate_excess(at_rate(math.nan), config) is None


@pytest.mark.parametrize(
    ("log_odds", "exponent", "expected"),
    [
        (-5.0, 1.0, -5.0),
        (5.0, 1.0, 5.0),
        (-5.0, 0.0, -2.0),
        (5.0, 0.0, 2.0),
        (1.5, 0.0, 1.5),
        (-1.5, 0.0, -1.5),
        (5.0, 0.3, 3.5),
        (-5.0, 0.3, -3.5),
        (5.0, None, 5.0),
    ],
)
def test_the_prior_counts_within_its_weight_behind_normalisation(
    log_odds: float, exponent: float | None, expected: float
) -> None:
    config = RiskConfig(normalized_weight=2.0)
    assert weighed(log_odds, at_rate(1.0, exponent), config) == pytest.approx(expected)


def test_states_that_are_not_finite_have_the_highest_forecast() -> None:
    _, risk = assess(RiskState(), observation(step=1, informative=False, non_finite=True), CONFIG)
    assert (risk.value, risk.forecast) == (1.0, 1.0)


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.33, 1.0])
def test_normalised_layers_are_compared_by_the_median_of_three_snapshots(exponent: float) -> None:
    """Each layer has its own median. With fewer snapshots, and for other layers, the snapshot itself counts."""
    draw = random.Random(0)
    series = [(draw.uniform(0, 3), draw.uniform(0, 3), draw.uniform(0, 3)) for _ in range(8)]
    state = RiskState()
    for step, ratios in enumerate(series):
        state, _ = assess(state, seen(step, ratios, exponent), CONFIG)
        last = series[max(0, step - 2) : step + 1]
        plain = exponent > 0.3 or len(last) < 3
        expected = ratios if plain else [statistics.median(column) for column in zip(*last, strict=True)]
        assert state.z == pytest.approx([math.log(u + CONFIG.update_ratio_floor) for u in expected])
        assert len(state.recent) == min(step + 1, 2)


@pytest.mark.parametrize("again", [seen(7, (0.4, 0.5)), seen(9, (0.4, 0.5)), seen(20, (0.4, 0.5, 0.6))])
@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_a_fresh_start_forgets_what_was_measured_of_the_layers(again: Observation, exponent: float) -> None:
    """Return the state without the losses and the initial expansive mass."""
    state = RiskState()
    for step in range(10):
        ratios = (0.5 if step % 2 else 4.0, 0.6)
        measured = seen(step, ratios, lr_scale=0.5, expansive_mass=0.1, loss=3.0 + step)
        state, _ = assess(state, replace(measured, max_attention_logit=20.0), CONFIG)
    assert state.restlessness > 0
    assert state.logits.logits
    again = replace(again, update_exponent=exponent)
    after, risk = assess(state, again, CONFIG)
    new, _ = assess(replace(RiskState(), initial_expansive_mass=0.1, surprise=state.surprise), again, CONFIG)
    assert after == new
    assert (after.speed, after.restlessness, after.lr_scale, len(after.recent)) == ((), 0.0, 1.0, 1)
    assert risk.value == 0.0


def test_a_cut_starts_the_slow_mean_again_once() -> None:
    """The reset applies to the snapshot with the lower scale, and not to later ones or to a rise."""
    slow = CONFIG.restlessness_smoothing
    state, expected = RiskState(), 0.0
    for step, scale in enumerate((1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.75, 0.75, 0.6, 0.6)):
        before = state
        state, risk = assess(state, seen(2 * step, (1.0 if step % 2 else 1.3,), lr_scale=scale), CONFIG)
        assert state.lr_scale == scale
        if step == 0:
            continue
        peak = risk.components["peak"]
        assert 0 < peak < 1
        expected = slow * peak + (0.0 if scale < before.lr_scale else (1 - slow) * expected)
        assert state.restlessness == pytest.approx(expected)


def test_a_small_unsteadiness_has_a_small_risk() -> None:
    for height in (1.01, 1.1, 1.3, 1.6):
        risk = follow([(0, (1.0,)), (2, (height,))])[-1]
        v = risk.components["unsteadiness"]
        assert v > 0
        assert risk.value == pytest.approx(v**4 / (1 + v**4))


def test_unknown_modes_count_as_reliable() -> None:
    found = []
    for weight in (0.0, 0.7):
        state = RiskState()
        for step, ratios in JUMP:
            state, risk = assess(state, seen(step, ratios), RiskConfig(reliability_weight=weight))
        found.append(risk.components["unsteadiness"])
    assert found[0] == found[1] > 0


def test_an_update_ratio_below_zero_counts_as_zero() -> None:
    """Only a forged snapshot has such a value."""
    forged, zero = (assess(RiskState(), seen(0, (ratio, 1.0)), CONFIG) for ratio in (-1e9, 0.0))
    assert forged == zero


@pytest.mark.parametrize("growth", [-10.0, 0.0, 3.0, 10.0])
@pytest.mark.parametrize("known", [-20.0, 0.0, 2.0, 20.0])
def test_the_forecast_is_the_logistic_function_of_prior_and_growth(known: float, growth: float) -> None:
    found = foresight({"prior": known, "growth": growth})
    assert found == pytest.approx(1 / (1 + math.exp(-known - growth)), rel=1e-12)
    assert 1 - found == pytest.approx(1 / (1 + math.exp(known + growth)), rel=1e-12, abs=2e-16)


@pytest.mark.parametrize("growth", [-1e9, 1e9])
def test_a_forecast_is_a_probability_whatever_grows(growth: float) -> None:
    assert foresight({"prior": 0.0, "growth": growth}) == pytest.approx(float(growth > 0), abs=1e-12)


# The reduction of a profile


MEANS = (
    "near_unit_mass",
    "expansive_mass",
    "spectral_radius",
    "update_ratio",
    "nonlinearity_ratio",
    "reliable_mode_ratio",
)
TRAINING = TrainingStep(step=7, loss=2.0, lr_scale=0.5)


def profile_of(*, informative: bool = True) -> SpectralProfile:
    """Three layers whose every field is another number."""
    states = torch.randn(4, 80, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    layers = [
        replace(
            layer,
            informative=informative,
            reason="" if informative else "constant input",
            **{name: 0.01 * place + 0.1 * index**2 for place, name in enumerate(MEANS)},
        )
        for index, layer in enumerate(profile_states(states).layers)
    ]
    return SpectralProfile(layers=tuple(layers))


def test_an_observation_has_the_means_of_the_layers_and_the_largest_radius() -> None:
    profile = profile_of()
    found = observe(profile, TRAINING, width=5, num_layers=3, update_exponent=0.3)
    for name in MEANS:
        values = [getattr(layer, name) for layer in profile.layers]
        assert getattr(found, name) == pytest.approx(statistics.fmean(values)), name
    assert found.spectral_radii == to_single(layer.spectral_radius for layer in profile.layers)
    assert found.max_spectral_radius == max(found.spectral_radii)
    assert found.update_ratios == to_single(layer.update_ratio for layer in profile.layers)
    assert (found.training, found.width, found.num_layers, found.update_exponent) == (TRAINING, 5, 3, 0.3)
    assert (found.informative, found.reason, found.non_finite) == (True, "", False)


def test_a_history_with_the_largest_logarithms_is_assessed() -> None:
    damaged = RiskState(step=4, z=(1000.0, 1000.0), recent=((1000.0, 1000.0), (1000.0, 1000.0)))
    state, risk = assess(damaged, seen(5, (0.5, 0.6), learning_rate=0.01, width=100, exponent=0.0), CONFIG)
    assert 0.0 <= risk.value <= 1.0
    assert all(map(math.isfinite, state.start.ratios))


@pytest.mark.parametrize(("number", "weight"), [(16, 1 / 16), (32, 1 / 4), (64, 1.0), (512, 1.0)])
def test_the_unsteadiness_of_few_tokens_counts_less(number: int, weight: float) -> None:
    def unsteadiness(number: int) -> OnlineRisk:
        state, risk = RiskState(), OnlineRisk(value=0.0, reason="")
        for step, ratio in enumerate((0.5, 0.5, 0.5, 2.0)):
            state, risk = assess(state, replace(seen(step, (ratio, 0.6)), num_tokens=number), CONFIG)
        return risk

    found, full = unsteadiness(number), unsteadiness(1000)
    assert found.components["unsteadiness"] == pytest.approx(weight * full.components["unsteadiness"])
    assert (f", weighed by {weight:.2f} for its {number} tokens" in found.reason) is (weight < 1.0)


def test_an_observation_has_the_number_of_tokens() -> None:
    assert observe(profile_of(), TRAINING).num_tokens == 80


def test_of_a_profile_that_is_not_informative_the_update_ratios_are_kept() -> None:
    profile = profile_of(informative=False)
    found = observe(profile, TRAINING)
    ratios = to_single(layer.update_ratio for layer in profile.layers)
    assert found == Observation(training=TRAINING, informative=False, reason=profile.reason, update_ratios=ratios)


@pytest.mark.parametrize("profile", [None, profile_of()])
def test_states_that_are_not_finite_have_no_measurements(profile: SpectralProfile | None) -> None:
    found = observe(profile, TRAINING, width=5, non_finite=True)
    assert found == Observation(
        training=TRAINING, informative=False, reason="the states are not finite", non_finite=True, width=5
    )


def test_without_a_profile_nothing_is_measured() -> None:
    assert observe(None, TRAINING) == Observation(training=TRAINING, informative=False, reason="no profile")
    plain = Observation(training=TRAINING, informative=False)
    assert (plain.num_layers, plain.update_ratios, plain.non_finite, plain.reason) == (0, (), False, "")


def test_a_new_run_has_no_history() -> None:
    state = RiskState()
    assert (state.initial_expansive_mass, state.step, state.z, state.recent, state.speed) == (None, None, (), (), ())
    assert (state.restlessness, state.lr_scale) == (0.0, 1.0)
    risk = OnlineRisk(value=0.5, reason="r")
    assert (risk.forecast, risk.excess_rate, dict(risk.components)) == (0.0, None, {})


@pytest.mark.parametrize(("rate", "counts_as"), [(0.0, 1e-12), (1e-13, 1e-12), (1e13, 1e12), (math.inf, 1e12)])
def test_rates_beyond_all_bounds_count_as_the_bounds(rate: float, counts_as: float) -> None:
    """The bounds keep the logarithm finite, also at rate 0 in the first step of a warm-up."""
    found = rate_excess(at_rate(rate), RiskConfig(critical_rate=2.0))
    assert found == pytest.approx(counts_as * 40 / 2.0)


def test_a_loss_without_news_makes_a_forecast_of_its_floor() -> None:
    """A z-score of 0 or less is 4 log(0.05) = -12 log-odds."""
    for z in (0.0, -5.0):
        assert log_odds(foresight({"prior": 2.0, "loss": z})) == pytest.approx(2.0 + 4 * math.log(0.05), rel=1e-6)
    assert log_odds(foresight({"prior": 0.0, "loss": 0.95})) == pytest.approx(0.0, abs=1e-9)


def with_logits(logits: list[float | None], **fields: Any) -> list[OnlineRisk]:
    """Risks of calm snapshots, 10 steps apart, of normalised layers at 2 times the critical rate."""
    rate = 2.0 * CONFIG.normalized_critical_rate / 100
    state, risks = RiskState(), []
    for index, logit in enumerate(logits):
        training: dict[str, Any] = {"learning_rate": rate, "width": 100, "exponent": 0.0, **fields}
        observed = replace(seen(10 * index, (0.5, 0.6), **training), max_attention_logit=logit, max_attention_layer=1)
        state, risk = assess(state, observed, CONFIG)
        risks.append(risk)
    return risks


def test_attention_logits_that_grow_are_an_alarm() -> None:
    risks = with_logits([20.0] * 10 + [20.0 * GROWTH, 40.0 * GROWTH, 20.0])
    assert max(risk.value for risk in risks[:10]) == 0.0
    assert risks[10].value == pytest.approx(0.5)
    assert risks[11].value == pytest.approx(16 / 17), "the logistic function of 4 log 2"
    assert risks[10].causes == risks[11].causes == ("attention",)
    below = with_logits([20.0] * 10 + [40.0])[-1]
    assert below.value == pytest.approx(0.8**4 / (0.8**4 + 1))
    assert below.causes == (), "no alarm, but a closer look"
    assert risks[11].reason.startswith("attention logits of layer 1 grew to 100, 5.0 times their level; ")


@pytest.mark.parametrize(
    "fields",
    [
        {"exponent": 1.0},
        {"exponent": 0.33},
        {"learning_rate": 0.99 * CONFIG.normalized_critical_rate / 100},
        {"learning_rate": None},
        {"lr_scale": 0.49},
    ],
)
def test_grown_logits_alone_are_no_alarm(fields: dict[str, Any]) -> None:
    """Without normalisation, at a rate below the critical one, or at one that is unknown."""
    risks = with_logits([20.0] * 10 + [1000.0], **fields)
    assert max(risk.value for risk in risks) == 0.0


def test_the_rate_in_force_counts_for_grown_logits() -> None:
    assert with_logits([20.0] * 10 + [100.0], lr_scale=0.51)[-1].value > 0.9


def at_the_start(ratios: Sequence[float], **fields: Any) -> list[OnlineRisk]:
    """Risks of the first snapshots, one for each step, of normalised layers at 0.4 times the critical rate."""
    training: dict[str, Any] = {"learning_rate": 0.4 * CONFIG.normalized_critical_rate / 100, "width": 100, **fields}
    state, risks = RiskState(), []
    for step, ratio in enumerate(ratios):
        state, risk = assess(state, seen(step, (0.3, ratio), **{"exponent": 0.0, **training}), CONFIG)
        risks.append(risk)
    return risks


GROWING = [0.3 * 1.25**step for step in range(20)]
"""Update ratios that grow tenfold within 10.3 steps, and too evenly for another alarm."""


@pytest.mark.parametrize("excess", [0.2, 0.4, 0.99])
def test_update_ratios_that_grow_tenfold_at_the_start_are_an_alarm(excess: float) -> None:
    risks = at_the_start(GROWING, learning_rate=excess * CONFIG.normalized_critical_rate / 100)
    assert [("warmup" in risk.causes) for risk in risks[:13]] == [step >= 8 for step in range(13)], "fourfold"
    assert max(risk.value for risk in risks[:12]) < 0.5, "it explains alarms and raises none"
    # The median of three is one step late: at step 12 it is the ratio of step 11.
    assert risks[12].value == pytest.approx(1.0 / (1.0 + (10.0 / 1.25**11) ** 4))
    assert risks[12].reason.startswith(
        "no warm-up: the update ratio of layer 1 is high after 12 steps at the full learning rate; "
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"exponent": 1.0},
        {"exponent": 0.33},
        {"learning_rate": None},
        {"learning_rate": 0.19 * CONFIG.normalized_critical_rate / 100},
    ],
)
def test_growth_at_the_start_alone_is_no_alarm(fields: dict[str, Any]) -> None:
    """Without normalisation, or at a rate that is unknown or low."""
    risks = at_the_start(GROWING, **fields)
    assert all("warmup" not in risk.causes for risk in risks)
    assert max(risk.value for risk in risks) < 0.5, "that of the unsteadiness alone"


def test_a_rate_above_the_critical_one_explains_the_growth_at_the_start_by_itself() -> None:
    risks = at_the_start(GROWING, learning_rate=CONFIG.normalized_critical_rate / 100)
    assert all("warmup" not in risk.causes for risk in risks)


def test_one_unusual_batch_at_the_start_is_no_alarm() -> None:
    risks = at_the_start([0.3] * 5 + [60.0] + [0.3] * 5)
    assert all("warmup" not in risk.causes for risk in risks)


@pytest.mark.parametrize(("exponent", "alarm"), [(0.0, True), (1.0, False)])
def test_normalised_blocks_that_come_to_overwrite_the_stream_are_an_alarm(exponent: float, alarm: bool) -> None:
    state, risks = RiskState(), []
    for step, radius in enumerate([38.0] * 3 + [20.0, 10.0, 5.0, 2.0, 1.9, 1.8, 1.0, 30.0]):
        observed = replace(seen(step, (0.8, 0.9), exponent=exponent), max_spectral_radius=radius)
        state, risk = assess(state, observed, CONFIG)
        risks.append(risk)
    assert [("overwritten" in risk.causes) for risk in risks] == [alarm and step in (8, 9) for step in range(11)]
    assert risks[9].value == pytest.approx(1.0 / (1.0 + (FALL / 38.0) ** 4) if alarm else 0.0)
    if alarm:
        words = "the blocks overwrite the stream: the largest radius fell from 38 to 1; "
        assert risks[9].reason.startswith(words)


def test_an_alarm_by_the_update_ratios_is_not_by_the_logits() -> None:
    state = RiskState()
    for step in range(100):
        observed = replace(
            seen(
                step, (0.5,) if step < 97 else (50.0 + 900.0 * (step % 2),), learning_rate=1.0, width=100, exponent=0.0
            ),
            max_attention_logit=20.0 if step < 97 else 60.0,
            max_attention_layer=0,
        )
        state, risk = assess(state, observed, CONFIG)
    assert risk.value > 0.9
    assert "attention" not in risk.causes


def test_a_snapshot_that_is_not_informative_leaves_the_logits_of_the_history() -> None:
    state, _ = assess(RiskState(), replace(seen(0, (0.5,)), max_attention_logit=20.0), CONFIG)
    after, _ = assess(state, replace(seen(10, (0.5,), informative=False), max_attention_logit=20.0), CONFIG)
    assert after.logits == state.logits == LogitGrowth((20.0,), 0)
