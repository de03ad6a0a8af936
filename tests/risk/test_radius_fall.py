"""Fall of the spectral radii: the level of the start, the snapshots in a row, and unknown radii."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.risk.radius_fall import FALL, SNAPSHOTS, RadiusFall


def follow(*radii: float | None) -> RadiusFall:
    found = RadiusFall()
    for radius in radii:
        found = found.after(radius)
    return found


def test_the_level_is_the_largest_radius_of_the_first_snapshots() -> None:
    assert follow(20.0, 40.0, 30.0, 100.0).level == 40.0
    assert follow(0.2, 0.1, 0.2, 3.0).level == 0.2
    assert follow(20.0, None, math.inf, 40.0) == RadiusFall(40.0, 2), "an unknown radius is none of them"


@pytest.mark.parametrize(("number", "value"), [(SNAPSHOTS - 1, 0.0), (SNAPSHOTS, 2.0), (SNAPSHOTS + 5, 2.0)])
def test_a_fall_counts_after_some_snapshots_in_a_row(number: int, value: float) -> None:
    assert follow(*[40.0] * SNAPSHOTS, *[20.0 / FALL] * number).value == pytest.approx(value)


def test_a_fall_of_one_unit_counts_and_the_largest_is_a_million() -> None:
    assert follow(*[FALL] * SNAPSHOTS, 1.0, 1.0, 1.0).value == 1.0
    assert follow(*[1e9] * SNAPSHOTS, 1e-9, 1e-9, 1e-9).value == 1e6


@pytest.mark.parametrize("between", [41.0 / FALL, None, math.nan, 0.0])
def test_another_radius_between_them_starts_the_count_again(between: float | None) -> None:
    low = 20.0 / FALL
    assert follow(40.0, 40.0, 40.0, low, low, between, low).value == 0.0
    assert follow(40.0, 40.0, 40.0, low, low, between, low, low, low).value == pytest.approx(2.0)


def test_a_radius_that_grew_later_is_no_level() -> None:
    """The first block of a Pre-LN model grows from 1 to 40 and may fall again."""
    assert follow(1.2, 1.2, 1.3, *[40.0] * 50, *[1.0] * 50).value == 0.0


@given(st.lists(st.one_of(st.none(), st.floats())))
def test_any_series_keeps_the_bounds(radii: list[float | None]) -> None:
    found = RadiusFall()
    for radius in radii:
        found = found.after(radius)
        assert 0.0 <= found.value <= 1e6
        assert 0.0 <= found.level < math.inf
        assert found.num_first <= SNAPSHOTS
