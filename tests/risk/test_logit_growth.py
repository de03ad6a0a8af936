"""Growth of attention logits: the level, its bounds, and what leaves the history as it is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.risk.logit_growth import GROWTH, LEAST_LOGIT, MIN_LOGITS, NUM_LOGITS, SPACING, LogitGrowth


def calm(logit: float = 20.0, number: int = NUM_LOGITS) -> LogitGrowth:
    """History of snapshots SPACING steps apart, from step 0 on."""
    found = LogitGrowth()
    for index in range(number):
        found = found.after(index * SPACING, logit)
    return found


@pytest.mark.parametrize("logit", [LEAST_LOGIT, 50.0, 500.0])
def test_growth_is_the_ratio_to_the_median(logit: float) -> None:
    assert calm().after(100, logit).value == pytest.approx(logit / 20.0 / GROWTH)


def test_small_logits_have_no_growth() -> None:
    assert calm(0.1).after(100, 29.9).value == 0.0


@pytest.mark.parametrize(("number", "known"), [(7, False), (8, True)])
def test_a_level_needs_some_logits(number: int, known: bool) -> None:
    assert (calm(number=number).after(200, 100.0).value > 0.0) is known


def test_dense_snapshots_do_not_fill_the_history() -> None:
    found, values = calm(), []
    for step in range(91, 140):
        found = found.after(step, 100.0)
        values.append(found.value)
    assert min(values) == pytest.approx(100.0 / 20.0 / GROWTH)
    assert found.logits == (20.0,) * 6 + (100.0,) * 4
    assert found.step == 130


def test_the_newest_logit_is_compared_with_those_before_it() -> None:
    found = calm(number=MIN_LOGITS).after(MIN_LOGITS * SPACING, 1000.0)
    assert (found.logits[-1], found.value) == (1000.0, 1000.0 / 20.0 / GROWTH)


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf, 0.0, -5.0])
def test_an_unknown_logit_leaves_the_history(unknown: float | None) -> None:
    before = calm().after(100, 100.0)
    assert before.after(110, unknown) == LogitGrowth(before.logits, before.step)


@given(st.lists(st.tuples(st.integers(0, 1000), st.one_of(st.none(), st.floats()))))
def test_any_series_keeps_the_bounds(series: list[tuple[int, float | None]]) -> None:
    found = LogitGrowth()
    for step, logit in series:
        found = found.after(step, logit)
        assert len(found.logits) <= NUM_LOGITS
        assert found.value >= 0.0


def test_tiny_logits_give_no_infinite_growth() -> None:
    """A history is kept as JSON, which has no infinity."""
    assert calm(1e-300).after(100, 1e308).value == 1e308 / GROWTH
    assert calm(0.5).after(100, 100.0).value == 100.0 / GROWTH
