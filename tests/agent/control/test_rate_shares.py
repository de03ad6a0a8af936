"""Groups whose rate outgrew the others: which ones, their bounds, and the way through the state of all ranks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.agent.control.rate_shares import OUTGROWN, as_parameters, factors, from_parameters, outgrown


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ((1.0, 1.0), (0.9, 27.0), {1: (0, 1.0)}),
        ((1.0, 0.1), (0.9, 2.7), {1: (0, 0.1)}),
        ((1.0, 1.0, 1.0), (1.0, 30.0, 40.0), {}),  # most groups grew
        ((1.0, 1.0, 1.0), (30.0, 1.0, 1.0), {0: (1, 1.0)}),
        ((1.0, 1.0), (30.0, 30.0), {}),  # the whole schedule rose
        ((1.0, 1.0), (0.1, 1.0), {}),  # one group slowed down
        ((1.0, 1.0), (1.0, OUTGROWN), {1: (0, 1.0)}),
        ((1.0, 1.0), (1.0, 1.99), {}),
        ((1.0, 0.0), (1.0, 3.0), {}),  # a group that did not train
        ((0.0, 1.0, 1.0), (0.5, 1.0, 5.0), {2: (1, 1.0)}),
        ((math.nan, 1.0), (1.0, math.inf), {}),
        ((1.0,), (1.0, 30.0), {}),
        ((), (), {}),
    ],
)
def test_groups_that_outgrew_the_others(
    before: tuple[float, ...], now: tuple[float, ...], found: dict[int, tuple[int, float]]
) -> None:
    assert outgrown(before, now) == found


def test_a_bound_follows_the_other_group_and_ends_with_the_fault() -> None:
    shares = {1: (0, 0.5)}
    assert factors(shares, (1.0, 30.0)) == [1.0, 0.5 / 30.0]
    assert factors(shares, (0.1, 3.0)) == [1.0, pytest.approx(0.05 / 3.0)]
    assert factors(shares, (1.0, 0.4)) == [1.0, 1.0]


@pytest.mark.parametrize("rates", [(1.0,), (), (0.0, 1.0), (1.0, 0.0)])
def test_a_bound_without_its_groups_has_no_effect(rates: tuple[float, ...]) -> None:
    assert factors({1: (0, 0.5)}, rates) == [1.0] * len(rates)


@given(st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9)), max_size=8))
def test_factors_only_lower_rates(pairs: list[tuple[float, float]]) -> None:
    before, now = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
    assert all(0.0 < factor <= 1.0 for factor in factors(outgrown(before, now), now))


def test_shares_pass_through_the_parameters_of_an_action() -> None:
    shares = {1: (0, 0.5), 12: (3, 2.0)}
    assert from_parameters({"interval": 16, "at_step": 3, **as_parameters(shares)}) == shares
    assert from_parameters({"share.1.0": math.nan, "share.2.0": -1.0, "share.3.0": math.inf}) == {}
