"""z-score of the logged loss against the last losses of the run, for any values and any logging interval."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.risk.loss_zscore import LARGEST, MIN_LOSSES, WINDOW, LossZScore


def follow(losses: list[float | None]) -> LossZScore:
    score = LossZScore()
    for loss in losses:
        score = score.after(loss)
    return score


def test_value_is_the_z_score_against_the_window() -> None:
    losses = [3.0 - 0.01 * step + 0.003 * (step % 3) for step in range(30)]
    before = losses[-WINDOW:]
    deviation = statistics.pstdev(before) + 1e-3 * statistics.fmean(before)
    assert follow([*losses, 3.5]).value == pytest.approx((3.5 - statistics.fmean(before)) / deviation)
    assert follow(losses).value < 0, "a falling loss has a negative z-score"


def test_value_is_zero_with_too_few_losses() -> None:
    assert follow([3.0, 2.9, 2.8, 2.7, 99.0]).value == 0.0
    assert follow([3.0, 2.9, 2.8, 2.7, 2.6, 99.0]).value > 100.0
    assert MIN_LOSSES == 5


def test_a_repeated_or_missing_loss_changes_nothing() -> None:
    seldom = [loss for step in range(12) for loss in [3.0 - 0.1 * (step % 4)] * 10]
    assert follow(seldom) == follow(seldom[::10])
    assert follow([*seldom, None]) == follow(seldom)


def test_a_non_finite_loss_has_the_largest_value_and_is_not_stored() -> None:
    calm = follow([3.0, 2.9, 3.1, 2.8, 3.0, 2.9, 3.05])
    for bad in (math.nan, math.inf):
        assert calm.after(bad).value == LARGEST
        assert calm.after(bad).losses == calm.losses


@given(st.lists(st.none() | st.floats(), max_size=60))
def test_it_is_finite_and_bounded_whatever_comes(losses: list[float | None]) -> None:
    surprise = follow(losses)
    assert math.isfinite(surprise.value)
    assert surprise.value <= LARGEST
    assert len(surprise.losses) <= WINDOW
    assert all(math.isfinite(loss) for loss in surprise.losses)


@pytest.mark.parametrize("loss", [1e30, -1e30, 1e300])
def test_a_loss_whose_square_is_not_finite_counts_as_not_finite(loss: float) -> None:
    calm = follow([3.0, 2.9, 3.1, 2.8, 3.0, 2.9])
    assert calm.after(loss).value == LARGEST
    assert calm.after(loss).losses == calm.losses
    assert calm.after(0.999e30).losses[-1] == 0.999e30


def test_a_loss_near_zero_has_a_least_deviation() -> None:
    """The term 1e-12 in the deviation ignores the noise of a loss of zero."""
    vanished = follow([0.0, 1e-300] * 4)
    assert vanished.after(5e-13).value == pytest.approx(0.5)
    assert vanished.after(1.0).value == LARGEST


def test_the_last_20_losses_are_known_and_a_z_score_is_at_most_a_million() -> None:
    losses = [float(index % 7) for index in range(40)]
    assert follow(losses).losses == tuple(losses[-20:])
    assert follow([*losses, 1e25]).value == 1e6
    assert LossZScore().value == 0.0
