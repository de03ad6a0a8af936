"""ROC areas and calibration errors of small cases with known values."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")

import numpy as np

from benchmarks.scoring import auroc


def test_area_is_the_share_of_pairs_in_order() -> None:
    area = auroc([False, False, True, True], [1.0, 3.0, 2.0, 4.0])
    assert area is not None
    assert area.value == 0.75
    assert area.low <= 0.75 <= area.high
    assert (area.num_runs, area.num_diverged) == (4, 2)


def test_a_perfect_score_is_not_more_certain_than_its_runs() -> None:
    few = auroc([False] * 10 + [True] * 10, range(20))
    many = auroc([False] * 100 + [True] * 100, range(200))
    assert few is not None
    assert many is not None
    assert few.value == many.value == many.high == 1.0
    assert few.low == pytest.approx(1 - 0.3085, abs=1e-3)  # Clopper-Pearson, 0 of 10
    assert 0.95 < many.low < 1.0


def test_scores_that_are_not_finite_are_placed_at_the_ends() -> None:
    area = auroc([True, False, False, True], [math.inf, -math.inf, 0.0, 1.0])
    assert area is not None
    assert area.value == 1.0
    lost = auroc([True, False, False, True], [math.nan, 0.0, 0.0, 1.0])
    assert lost is not None
    assert lost.value == 0.5


def test_one_kind_of_run_has_no_area() -> None:
    assert auroc([True, True], [1.0, 2.0]) is None


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(60) < 30
    covered = 0
    for trial in range(40):
        area = auroc(labels.tolist(), draw.normal(size=60) + labels, seed=trial)
        covered += area is not None and area.low <= 0.7602 <= area.high  # P(N(1, 1) > N(0, 1))
    assert covered >= 33
