"""Bounds on the rates of single groups: which groups, how large, and the way through the state of all ranks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.agent.control.rate_shares import (
    as_parameters,
    factors,
    from_parameters,
    in_force,
    outgrown,
    shares_of,
)
from koopmon.agent.control.state import ActionState, Ramp
from koopmon.wire.messages import MAX_RATE


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ((1.0, 1.0), (0.9, 27.0), [1]),
        ((1.0, 0.1), (0.9, 2.7), [1]),
        ((1.0, 1.0), (27.0, 0.9), [0]),
        ((1.0, 1.0, 1.0), (1.0, 30.0, 40.0), []),  # most groups grew
        ((1.0, 1.0, 1.0, 1.0), (1.0, 30.0, 0.9, 40.0), [1, 3]),
        ((1.0, 1.0), (30.0, 30.0), []),  # the whole schedule rose
        ((1.0, 1.0), (10.0, 20.0), [1]),
        ((1.0, 1.0), (10.0, 19.9), []),
        ((10.0, 1.0), (1.0, 1.0), []),  # one group slowed down
        ((10.0, 1.0), (1.0, 2.0), [1]),  # a typical growth below 1 counts as 1
        ((10.0, 1.0), (1.0, 1.95), []),
        ((1.0, 1.0), (0.0, 30.0), []),
        ((math.inf, 1.0), (1.0, 30.0), []),
        ((1.0, 0.0), (1.0, 3.0), []),  # a group that did not train
        ((1.0, 3.0), (1.0, 0.0), []),
        ((0.0, 1.0, 1.0), (0.5, 1.0, 5.0), [2]),
        ((math.nan, 1.0), (1.0, math.inf), []),
        ((1.0, math.inf), (1.0, math.nan), []),
        ((1.0,), (30.0,), []),
        ((1.0,), (1.0, 30.0), []),
        ((), (1.0, 30.0), []),
        ((), (), []),
    ],
)
def test_groups_that_outgrew_the_others(before: tuple[float, ...], now: tuple[float, ...], found: list[int]) -> None:
    assert outgrown(before, now, 1.9) == found


def test_a_group_with_a_bound_is_no_measure_for_the_others() -> None:
    assert outgrown((1.0, 1.0, 1.0), (1.0, 20.0, 30.0), 2.0) == [], "most groups grew"
    assert outgrown((1.0, 1.0, 1.0), (1.0, 20.0, 30.0), 2.0, {1: 1.0}) == [2]
    assert outgrown((1.0, 1.0, 1.0), (1.0, 20.0, 30.0), 2.0, {0, 1}) == []


def test_a_group_below_the_cap_is_not_at_fault() -> None:
    assert outgrown((1.0, 1.0), (1.0, 30.0), 29.9) == [1]
    assert outgrown((1.0, 1.0), (1.0, 30.0), 30.0) == []


def test_a_share_is_the_rate_over_the_largest_of_the_other_groups() -> None:
    assert shares_of([1], (2.0, 1.0, 0.5)) == {1: 0.5}
    assert shares_of([0, 2], (2.0, 1.0, 0.5)) == {0: 2.0, 2: 0.5}
    assert shares_of([1], (2.0, 1.0, math.inf, math.nan)) == {1: 0.5}
    assert shares_of([0, 1], (2.0, 0.0, 1.0)) == {0: 2.0}, "no share of 0"
    assert shares_of([0], (1e9, 1e-9)) == {0: MAX_RATE}
    assert shares_of([0, 1], (1.0, 1.0)) == {}, "no other group"
    assert shares_of([1], (0.0, 1.0)) == {}
    assert shares_of([1], (-0.5, 1.0)) == {}
    assert shares_of([], (1.0, 1.0)) == {}


def test_a_bound_follows_the_other_groups_and_ends_with_the_fault() -> None:
    shares = {1: 0.5}
    assert factors(shares, (1.0, 30.0)) == [1.0, 0.5 / 30.0]
    assert factors(shares, (0.1, 3.0, 0.2)) == [1.0, pytest.approx(0.1 / 3.0), 1.0]
    assert factors(shares, (1.0, 0.4)) == [1.0, 1.0]
    assert factors({0: 1.0, 1: 2.0}, (30.0, 30.0, 1.0)) == pytest.approx([1 / 30, 1 / 15, 1.0])
    assert factors(shares, (1e-12, 1.0)) == [1.0, 1e-9]
    assert factors({}, (1.0, 30.0)) == [1.0, 1.0]


@pytest.mark.parametrize("rates", [(1.0,), (), (0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.nan)])
def test_a_bound_without_its_groups_has_no_effect(rates: tuple[float, ...]) -> None:
    assert factors({1: 0.5}, rates) == [1.0] * len(rates)


RATES = st.floats(1e-9, 1e9)


@given(st.lists(st.tuples(RATES, RATES), max_size=8), RATES)
def test_factors_only_lower_rates_and_only_above_the_cap(pairs: list[tuple[float, float]], cap: float) -> None:
    before, now = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
    found = factors(shares_of(outgrown(before, now, cap), before), now)
    assert len(found) == len(now)
    assert all(0.0 < factor <= 1.0 and (factor == 1.0 or rate > cap) for factor, rate in zip(found, now, strict=True))


@given(st.lists(RATES, min_size=1, max_size=8), st.sets(st.integers(0, 9)))
def test_at_the_rates_of_the_copy_a_bound_has_no_effect(rates: list[float], groups: set[int]) -> None:
    within = {each for each in groups if each < len(rates)}
    shares = {each: share for each, share in shares_of(within, rates).items() if share < MAX_RATE}
    assert factors(shares, rates) == pytest.approx([1.0] * len(rates))


def test_shares_pass_through_the_parameters_of_an_action() -> None:
    shares = {1: 0.5, 12: 2.0}
    parameters = {"interval": 16, "at_step": 3, **as_parameters(shares)}
    assert from_parameters(parameters) == shares
    assert from_parameters({"share.1": math.nan, "share.2": 0.0, "share.3": 1.1 * MAX_RATE, "share.4": MAX_RATE}) == {
        4: MAX_RATE
    }
    assert from_parameters({"share.x": 1.0, "share.": 1.0, "share.-1": 1.0, "shares": 1.0, "share.2": 1}) == {2: 1.0}
    part = ActionState(ramp=Ramp(target=1.0), parameters=parameters)
    assert in_force(part) == shares
    assert in_force(ActionState(ramp=Ramp(start=1.0, target=0.0), parameters=parameters)) == {}
    assert in_force(None) == {}
