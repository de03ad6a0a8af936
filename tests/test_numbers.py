"""Means of values that may be missing or huge, and float32."""

from __future__ import annotations

import math
import struct
import sys

import pytest

from koopmon.numbers import MAX_SINGLE, mean, to_single

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


def test_a_single_is_the_nearest_float32_within_its_range() -> None:
    values = (1 / 3, 1e-300, 0.0, 1e300, -math.inf, MAX_SINGLE)
    found = to_single(values)
    assert found == (struct.unpack("f", struct.pack("f", 1 / 3))[0], 0.0, 0.0, MAX_SINGLE, -MAX_SINGLE, MAX_SINGLE)
    assert to_single(found) == found
    assert math.isnan(to_single([math.nan])[0])
