"""Band of a scalar's own history: outliers, departures and new levels, for any values."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.risk.band import DEPARTURE, MIN_VALUES, Band, BandReading


def follow(band: Band, values: list[float], *, start: int = 0) -> list[BandReading]:
    return [band.read(start + step, value) for step, value in enumerate(values)]


def noise(count: int, *, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [1.0 + 0.1 * generator.gauss(0.0, 1.0) for _ in range(count)]


def calm() -> Band:
    band = Band()
    follow(band, noise(50))
    return band


def test_a_band_needs_values_and_then_holds_those_of_a_calm_run() -> None:
    readings = follow(Band(), noise(500))
    assert all(each.low is None for each in readings[:MIN_VALUES])
    assert all(each.low < each.value < each.high for each in readings[MIN_VALUES:])  # type: ignore[operator]
    assert not any(each.departed for each in readings)


@pytest.mark.parametrize("far", [9.0, -9.0, 1e300, math.inf, -math.inf, math.nan])
def test_one_outlier_is_no_departure_and_does_not_widen_the_band(far: float) -> None:
    band = calm()
    (outlier,) = follow(band, [far], start=100)
    after = follow(band, noise(20, seed=1), start=101)
    assert not outlier.departed
    assert after[0].high == outlier.high
    assert not any(each.departed for each in after)


@pytest.mark.parametrize("far", [9.0, -9.0, math.inf, math.nan])
def test_a_departure_is_counted_once_and_a_new_level_becomes_the_band(far: float) -> None:
    band = calm()
    readings = follow(band, [far] * MIN_VALUES, start=100)
    assert [each.departed for each in readings].index(True) == DEPARTURE - 1
    assert sum(each.departed for each in readings) == 1
    (next_one,) = follow(band, [far], start=200)
    if math.isfinite(far):
        assert next_one.low is not None
        assert next_one.high is not None
        assert next_one.low < far < next_one.high
    else:
        assert next_one.low is None


def test_growth_by_half_at_each_value_departs_soon() -> None:
    band = calm()
    readings = follow(band, [1.5**power for power in range(12)], start=100)
    assert any(each.departed for each in readings)


def test_a_scalar_that_may_fall_departs_upwards_only() -> None:
    falling, rising = Band(upper_only=True), Band(upper_only=True)
    for band in (falling, rising):
        follow(band, noise(50))
    assert not any(each.departed for each in follow(falling, [-5.0] * 10, start=100))
    assert any(each.departed for each in follow(rising, [5.0] * 10, start=100))


def test_a_repeated_step_adds_nothing() -> None:
    band = calm()
    readings = [band.read(100, 9.0) for _ in range(10)]
    assert not any(each.departed for each in readings)
    assert len({each.high for each in readings}) == 1
    follow(band, [9.0, 9.0], start=101)
    assert [band.read(102, 9.0).departed for _ in range(3)] == [False] * 3


@given(st.lists(st.floats()))
def test_any_values_give_limits_that_are_finite_and_in_order(values: list[float]) -> None:
    for reading in follow(Band(), values * 30):
        assert (reading.low is None) == (reading.high is None)
        if reading.low is not None and reading.high is not None:
            assert math.isfinite(reading.low)
            assert reading.low < reading.high or reading.low == reading.high != 0.0
