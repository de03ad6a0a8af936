"""Means of values that may be missing or huge."""

from __future__ import annotations

import math
import sys

import pytest

from koopmon.numbers import mean

LARGEST = sys.float_info.max


@pytest.mark.parametrize(
    "values", [[LARGEST] * 2, [LARGEST] * 3, [-LARGEST] * 7, [LARGEST, -LARGEST, LARGEST], [0.5] * 3]
)
def test_the_mean_of_finite_values_is_finite(values: list[float]) -> None:
    found = mean(values)
    assert found is not None
    assert min(values) <= found <= max(values)


def test_missing_values_do_not_count() -> None:
    assert mean([1.0, None, 2.0]) == 1.5
    assert mean([None]) is None
    assert mean([]) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_mean_with_a_value_that_is_not_finite_is_nan(value: float) -> None:
    found = mean([1.0, value, -value])
    assert found is not None
    assert math.isnan(found)
