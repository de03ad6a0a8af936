"""Calibrated probability of divergence: the fit, its predictions, and refused input."""

from __future__ import annotations

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from koopmon.errors import CalibrationError
from koopmon.risk.calibration import (
    PENALTY,
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
