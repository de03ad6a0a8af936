"""Growth of the update ratios at the start: its unit, its end, and what a warm-up is."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.risk.start_growth import GROWTH, LEAST_RATIO, MAX_RISE, START_STEPS, StartGrowth

FIRST = StartGrowth().after(3, 0.01, (0.5, 1.0))


def test_the_start_has_no_growth() -> None:
    assert StartGrowth() == StartGrowth(None, None, (), 0.0, 0)


def test_growth_is_the_ratio_to_the_first_snapshot_in_the_layer_that_grew_most() -> None:
    assert (FIRST.step, FIRST.rate, FIRST.ratios, FIRST.value) == (3, 0.01, (0.5, 1.0), 0.0)
    grown = FIRST.after(8, 0.01, (7.5, 10.0))
    assert (grown.value, grown.layer) == (pytest.approx(15.0 / GROWTH), 0)
    assert grown.after(9, 0.01, (0.5, 5.0)).value == pytest.approx(5.0 / GROWTH)


@pytest.mark.parametrize("first", [0.0, 1e-9, 0.1, LEAST_RATIO])
def test_a_block_that_starts_at_zero_counts_from_the_smallest_first_value(first: float) -> None:
    assert StartGrowth().after(0, 0.01, (first,)).after(5, 0.01, (2.0,)).value == 2.0 / 0.25 / GROWTH


@pytest.mark.parametrize(("after", "counts"), [(1, True), (START_STEPS, True), (START_STEPS + 1, False)])
def test_only_the_first_steps_count(after: int, counts: bool) -> None:
    assert (FIRST.after(3 + after, 0.01, (50.0, 50.0)).value > 0.0) is counts


@pytest.mark.parametrize(("rate", "counts"), [(0.01 * MAX_RISE, True), (0.0201, False), (0.001, True)])
def test_a_rate_that_rises_is_a_warm_up(rate: float, counts: bool) -> None:
    found = FIRST.after(5, rate, (50.0, 50.0))
    assert (found.value > 0.0) is counts
    later = found.after(6, 0.01, (50.0, 50.0))
    assert (later.value > 0.0) is counts, "a warm-up that was seen ends the comparison"


@pytest.mark.parametrize("rate", [None, math.nan, math.inf, 0.0, -1.0])
def test_an_unknown_rate_ends_the_comparison(rate: float | None) -> None:
    assert FIRST.after(5, rate, (50.0, 50.0)) == StartGrowth(3)
    assert StartGrowth().after(3, rate, (0.5,)) == StartGrowth(3)
    assert StartGrowth().after(3, 0.01, ()).after(5, 0.01, ()) == StartGrowth(3), "no layers"


@pytest.mark.parametrize(("step", "ratios"), [(3, (50.0, 50.0)), (2, (50.0, 50.0)), (5, (50.0,)), (5, ())])
def test_another_model_or_an_earlier_step_ends_the_comparison(step: int, ratios: tuple[float, ...]) -> None:
    found = FIRST.after(step, 0.01, ratios)
    assert found == StartGrowth(3)
    assert found.after(6, 0.01, (50.0, 50.0)) == StartGrowth(3)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 40),
            st.one_of(st.none(), st.floats()),
            st.lists(st.floats(0.0, 1e300), max_size=3).map(tuple),
        )
    )
)
def test_any_series_keeps_the_bounds(series: list[tuple[int, float | None, tuple[float, ...]]]) -> None:
    found = StartGrowth()
    for step, rate, ratios in series:
        found = found.after(step, rate, ratios)
        assert 0.0 <= found.value < math.inf
        assert found.layer < max(len(found.ratios), 1)
