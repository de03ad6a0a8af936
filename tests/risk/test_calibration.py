"""Calibrated probability of divergence: the fit, its predictions, and refused input."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from koopmon.errors import CalibrationError
from koopmon.risk.calibration import (
    PENALTY,
    SHIPPED,
    Calibrator,
    Example,
    calibration_error,
    fit,
    held_out,
    load,
    reliability,
    save,
)
from koopmon.risk.normalization import normalization_from_exponent


def sweep(num_runs: int = 300, *, seed: int = 0, slope: float = 8.0) -> list[Example]:
    """Draw runs with logistic outcomes. The critical rate rises with normalisation and falls with the width."""
    draw = random.Random(seed)
    examples = []
    for _ in range(num_runs):
        exponent, log_rate, width = draw.random(), draw.uniform(-4, -1), draw.choice((64, 128, 256))
        logit = slope * (log_rate - (-2.5 + normalization_from_exponent(exponent) - math.log10(width / 64)))
        diverged = draw.random() < 1 / (1 + math.exp(-min(max(logit, -50.0), 50.0)))
        examples.append(
            Example(
                update_exponent=exponent,
                learning_rate=10**log_rate,
                width=width,
                num_layers=4,
                diverged=diverged,
            )
        )
    return examples


def test_the_fit_maximises_the_penalised_likelihood() -> None:
    examples = sweep()
    calibrator = fit(examples)
    rows = [example.features() for example in examples]
    z = [[(v - m) / s for v, m, s in zip(row, calibrator.means, calibrator.scales, strict=True)] for row in rows]

    def objective(w: list[float]) -> float:
        logits = [w[-1] + sum(a * b for a, b in zip(w, row, strict=False)) for row in z]
        losses = (
            math.log1p(math.exp(-abs(t))) + max(t, 0.0) - t * e.diverged for t, e in zip(logits, examples, strict=True)
        )
        return sum(losses) + 0.5 * PENALTY * sum(a * a for a in w[:-1])

    optimize = pytest.importorskip("scipy.optimize")
    best = optimize.minimize(objective, [0.0] * 3, method="BFGS", options={"gtol": 1e-8})
    assert [*calibrator.weights, calibrator.intercept] == pytest.approx(list(best.x), abs=1e-3)


def test_calibration_holds_on_new_runs() -> None:
    calibrator = fit(sweep())
    others = sweep(3000, seed=1)
    for low in (0.0, 0.25, 0.5, 0.75):
        chosen = [e for e in others if low <= calibrator.probability(e) < low + 0.25]
        mean = sum(map(calibrator.probability, chosen)) / len(chosen)
        assert sum(e.diverged for e in chosen) / len(chosen) == pytest.approx(mean, abs=0.08)


def test_probability_never_falls_with_the_rate() -> None:
    backwards = [
        Example(update_exponent=i / 40, learning_rate=10 ** (-4 + i / 20), width=64, num_layers=4, diverged=i < 20)
        for i in range(40)
    ]
    calibrator = fit(backwards)
    assert calibrator.weights[0] == 0.0
    assert calibrator.weights[1] > 0.0


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_max_learning_rate_has_the_given_probability(probability: float) -> None:
    calibrator = fit(sweep())
    model = Example(update_exponent=0.4, learning_rate=1.0, width=128, num_layers=4)
    rate = calibrator.max_learning_rate(model, probability)
    assert rate is not None
    found = Example(update_exponent=0.4, learning_rate=rate, width=128, num_layers=4)
    assert calibrator.probability(found) == pytest.approx(probability, rel=1e-6)


def test_separable_runs_give_finite_weights() -> None:
    calibrator = fit(sweep(slope=1e4))
    assert all(math.isfinite(w) and abs(w) < 1e3 for w in calibrator.weights)


def test_too_few_runs_or_one_outcome_are_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 20"):
        fit(sweep(10))
    healthy = [Example(update_exponent=0.1, learning_rate=0.01, width=64, num_layers=4) for _ in range(30)]
    with pytest.raises(CalibrationError, match="30 runs, 0 of them diverged"):
        fit(healthy)
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        fit(sweep()).max_learning_rate(healthy[0], 1.0)


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "calibrator.json"
    calibrator = fit(sweep(), held_out_error=0.03, provenance={"runs": "sweep", "seed": 0})
    save(calibrator, path)
    assert load(path) == calibrator


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2, this koopmon reads version 3"),
        ({"weights": [1.0]}, "features"),
        ({"features": ["a"]}, "features a; allowed are"),
        ({"surprise": 1}, "surprise"),
        ({"intercept": "x"}, "intercept"),
        (None, "truncated"),
    ],
)
def test_an_invalid_file_is_refused_with_its_path(tmp_path: Path, change: dict[str, object] | None, says: str) -> None:
    path = tmp_path / "calibrator.json"
    save(fit(sweep()), path)
    if change is None:
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CalibrationError, match=says) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_irregular_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.json: No such file"):
        load(tmp_path / "nowhere.json")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(CalibrationError, match=f"^calibrator {path}: not a regular file"):
            load(path)


def test_features_match_their_names() -> None:
    example = Example(update_exponent=0.25, learning_rate=0.001, width=100, num_layers=10)
    assert example.features() == pytest.approx((0.0, 0.75))
    assert Calibrator.__struct_fields__[0] == "version"


def test_calibration_error() -> None:
    assert calibration_error([True, False, True, False], [0.5, 0.5, 0.5, 0.5]) == 0.0
    assert calibration_error([False, False], [1.0, 1.0]) == 1.0
    assert calibration_error([True, False, False, False], [0.9, 0.9, 0.1, 0.1]) == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)


def test_reliability_counts_every_run_once() -> None:
    rows = reliability([True, False, False, True], [0.05, 0.06, 0.95, 1.0])
    assert rows == [(pytest.approx(0.055), 0.5, 2), (pytest.approx(0.975), 0.5, 2)]


def test_held_out_excludes_the_group_of_a_run() -> None:
    examples = sweep()
    wrong = [replace(e, diverged=not e.diverged) if e.width == 64 else e for e in examples]
    pairs = zip(examples, held_out(examples), held_out(wrong), strict=True)
    assert all(honest == misled for example, honest, misled in pairs if example.width == 64)
    halves = [index % 2 for index in range(len(examples))]
    models = [fit([e for e, half in zip(examples, halves, strict=True) if half != out]) for out in (0, 1)]
    assert held_out(examples, halves) == [models[half].probability(e) for e, half in zip(examples, halves, strict=True)]
    alone = [replace(e, width=128) for e in examples]
    assert calibration_error([e.diverged for e in alone], held_out(alone)) < 0.1


def test_a_rate_above_the_highest_of_the_fit_is_not_covered() -> None:
    examples = sweep()
    calibrator = fit(examples)
    highest = max(example.effective_rate for example in examples)
    large = Example(update_exponent=0.0, learning_rate=1.001 * highest / (4096 * 32), width=4096, num_layers=32)
    assert not calibrator.covers(large)
    assert calibrator.covers(replace(large, learning_rate=large.learning_rate / 1.01))
    rate = calibrator.max_learning_rate(large, 0.999)
    assert rate is not None
    assert rate <= highest / (4096 * 32) * (1 + 1e-9)


# The model by hand: log-odds 2 + 3 (log10(effective rate) + 1) / 0.5 - 4 (strength - 0.25) / 0.2


BY_HAND = Calibrator(
    adapter="transformer",
    weights=(3.0, -4.0),
    intercept=2.0,
    means=(-1.0, 0.25),
    scales=(0.5, 0.2),
    highest_effective_rate=30.0,
    num_runs=40,
    num_diverged=20,
)


def effective(rate: float, *, exponent: float = 1.0, width: int = 1, num_layers: int = 1) -> Example:
    """Run with that learning rate. Without a width and a depth its effective rate is the learning rate."""
    return Example(update_exponent=exponent, learning_rate=rate, width=width, num_layers=num_layers)


@pytest.mark.parametrize(("exponent", "strength"), [(0.0, 1.0), (0.3, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("rate", [1e-5, 1e-2, 0.9, 29.0])
def test_log_odds_are_linear_in_the_standardised_features(rate: float, exponent: float, strength: float) -> None:
    expected = 2.0 + 3.0 * (math.log10(rate) + 1.0) / 0.5 - 4.0 * (strength - 0.25) / 0.2
    example = effective(rate, exponent=exponent)
    assert BY_HAND.logit(example) == pytest.approx(expected)
    assert BY_HAND.probability(example) == pytest.approx(1 / (1 + math.exp(-expected)), rel=1e-9)


@pytest.mark.parametrize("logit", [-1e4, -36.0, -30.0, 0.0, 30.0, 36.0, 1e4])
def test_a_probability_is_never_certain(logit: float) -> None:
    """The result is the logistic function as long as float64 separates it from 1, and its last such value beyond."""
    flat = msgspec.structs.replace(BY_HAND, weights=(0.0, 0.0), intercept=logit)
    found = flat.probability(effective(1.0))
    assert 0.0 < found < 1.0
    bounded = min(max(logit, -36.0), 36.0)
    assert found == pytest.approx(1 / (1 + math.exp(-bounded)), rel=1e-12)
    assert 1.0 - found == pytest.approx(1 / (1 + math.exp(bounded)), rel=0.1, abs=1e-16 if logit > 0 else 0)


def test_the_highest_rate_of_the_fit_is_covered() -> None:
    assert BY_HAND.covers(effective(30.0))
    assert BY_HAND.covers(effective(1.0, width=6, num_layers=5))
    assert not BY_HAND.covers(effective(1.0, width=31))
    assert not BY_HAND.covers(effective(1.0, num_layers=31))


@pytest.mark.parametrize("probability", [-0.5, 0.0, 1.0, 1.5, math.nan])
def test_a_probability_out_of_bounds_is_refused(probability: float) -> None:
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        BY_HAND.max_learning_rate(effective(1.0), probability)


def test_the_highest_rate_stays_in_its_bounds() -> None:
    """The rate is at most 1 and within the highest effective rate of the fit; None below the lowest rate."""
    assert BY_HAND.max_learning_rate(effective(1.0), 1 - 1e-12) == pytest.approx(1.0)
    assert BY_HAND.max_learning_rate(effective(1.0, width=20, num_layers=30), 1 - 1e-12) == pytest.approx(30 / 600)
    safe = msgspec.structs.replace(BY_HAND, intercept=-1e3)
    assert safe.max_learning_rate(effective(1.0, width=20, num_layers=30), 0.5) == pytest.approx(30 / 600)
    lost = msgspec.structs.replace(BY_HAND, intercept=1e3)
    assert lost.max_learning_rate(effective(1.0), 0.5) is None
    edge = msgspec.structs.replace(BY_HAND, weights=(1.0, 0.0), means=(0.0, 0.0), scales=(1.0, 1.0), intercept=7.0)
    assert edge.max_learning_rate(effective(1.0), 0.5) == pytest.approx(1e-7), "the lowest rate itself is in bounds"
    steep = msgspec.structs.replace(edge, weights=(0.5, 0.0), intercept=1.0)
    assert steep.max_learning_rate(effective(1.0), 0.5) == pytest.approx(1e-2)


@pytest.mark.parametrize(("intercept", "rate"), [(-1.0, 1.0), (0.0, 1.0), (1.0, None)])
def test_without_an_influence_of_the_rate_all_rates_or_none_will_do(intercept: float, rate: float | None) -> None:
    flat = msgspec.structs.replace(BY_HAND, weights=(0.0, 0.0), intercept=intercept)
    assert flat.max_learning_rate(effective(1.0), 0.5) == rate
    large = flat.max_learning_rate(effective(1.0, width=20, num_layers=30), 0.5)
    assert large == (None if rate is None else pytest.approx(30 / 600))


# The fit against its definition


def gradient(calibrator: Calibrator, examples: list[Example]) -> list[float]:
    """Compute the penalised negative log-likelihood from the weights and the intercept."""
    rows = [
        [
            *((v - m) / s for v, m, s in zip(e.features(), calibrator.means, calibrator.scales, strict=True)),
            1.0,
        ]
        for e in examples
    ]
    errors = [calibrator.probability(e) - e.diverged for e in examples]
    penalties = [*(PENALTY * w for w in calibrator.weights), 0.0]
    return [sum(x[i] * d for x, d in zip(rows, errors, strict=True)) + penalties[i] for i in range(3)]


@pytest.mark.parametrize("slope", [2.0, 50.0, 1e4])
def test_no_weight_can_be_improved(slope: float) -> None:
    """This includes separable runs, for which full Newton steps overshoot."""
    examples = sweep(100, slope=slope)
    calibrator = fit(examples)
    assert max(map(abs, gradient(calibrator, examples))) < 1e-6
    mean = sum(map(calibrator.probability, examples)) / len(examples)
    assert mean == pytest.approx(sum(e.diverged for e in examples) / len(examples), abs=1e-8)


def test_features_are_standardised_over_the_runs() -> None:
    examples = sweep()
    calibrator = fit(examples)
    columns = list(zip(*(e.features() for e in examples), strict=True))
    assert calibrator.means == pytest.approx([statistics.fmean(column) for column in columns])
    assert calibrator.scales == pytest.approx([statistics.stdev(column) for column in columns])
    assert calibrator.highest_effective_rate == max(e.effective_rate for e in examples)
    assert (calibrator.num_runs, calibrator.num_diverged) == (300, sum(e.diverged for e in examples))


def test_a_feature_that_is_constant_has_no_weight_and_scale_one() -> None:
    examples = [replace(e, update_exponent=0.3) for e in sweep()]
    calibrator = fit(examples)
    assert calibrator.scales[1] == 1.0
    assert calibrator.weights[1] == pytest.approx(0.0, abs=1e-9)
    assert calibrator.weights[0] > 0


def test_a_weak_influence_of_the_rate_is_kept_and_a_weak_contrary_one_dropped() -> None:
    """Draw 40 runs, of which the upper half diverges slightly more often, or slightly less."""
    weak = [
        replace(
            effective(10 ** (index / 40 - 3), exponent=(index % 7) / 7),
            diverged=(index * 7) % 10 < (6 if index >= 20 else 4),
        )
        for index in range(40)
    ]
    contrary = [replace(e, diverged=not e.diverged) for e in weak]
    assert 0.0 < fit(weak).weights[0] < 1.0
    dropped = fit(contrary)
    assert dropped.weights[0] == 0.0
    assert gradient(dropped, contrary)[1:] == pytest.approx([0.0, 0.0], abs=1e-6), "the rest is still fitted"


def test_twenty_runs_are_enough() -> None:
    assert fit(sweep(20)).num_runs == 20
    with pytest.raises(CalibrationError, match="19 runs"):
        fit(sweep(19))


# Held-out runs and the reliability diagram


def test_runs_of_two_sizes_form_two_groups_and_runs_of_one_size_ten() -> None:
    examples = [replace(e, width=64 if index % 3 else 128) for index, e in enumerate(sweep(90, slope=3.0))]
    assert held_out(examples) == held_out(examples, [e.width for e in examples])
    deeper = [replace(e, width=64, num_layers=4 if index % 3 else 8) for index, e in enumerate(examples)]
    assert held_out(deeper) == held_out(deeper, [e.num_layers for e in deeper])
    alone = [replace(e, width=64) for e in examples]
    assert held_out(alone) == held_out(alone, [index % 10 for index in range(len(alone))])


def test_the_diagram_has_ten_bins() -> None:
    probabilities = [0.05 + 0.1 * index for index in range(10)]
    assert reliability([True] * 10, probabilities) == [(pytest.approx(p), 1.0, 1) for p in probabilities]


def test_a_fit_on_which_full_steps_run_away_converges() -> None:
    """Draw rates with heavy tails and a few normalised models, which never diverge."""
    draw, examples = random.Random(8162), []
    for _ in range(400):
        log_rate = min(max(math.tan(math.pi * (draw.random() - 0.5)), -30.0), 29.0)
        normalised = draw.random() < 0.02
        logit = min(max(20 * log_rate - 40 * normalised + 3, -50.0), 50.0)
        diverged = draw.random() < 1 / (1 + math.exp(-logit))
        examples.append(replace(effective(10.0**log_rate, exponent=1.0 - normalised), diverged=diverged))
    assert max(map(abs, gradient(fit(examples), examples))) < 1e-6


def test_the_shipped_calibrator_is_that_of_the_benchmark() -> None:
    result = Path(__file__).parents[2] / "benchmarks" / "results" / "calibrator.json"
    assert load(SHIPPED) == load(result)
