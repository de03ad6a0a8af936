"""KSS by projection: the layers that get ceilings, and the factors on them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.policy.projection import MAX_FACTOR, MIN_FACTOR, calm_radii, ceiling_factors, largest_radius
from koopmon.wire.messages import MAX_CEILING_FACTOR, MAX_HELD_LAYERS

RADII = st.lists(st.floats(0.0, 1e300), min_size=1, max_size=80)


def test_the_first_calm_radii_are_those_of_the_snapshot_and_later_ones_move_them_a_little() -> None:
    first = calm_radii((), (1.5, 8.0))
    assert first == (1.5, 8.0)
    assert calm_radii(first, (2.5, 8.0)) == pytest.approx((1.6, 8.0))


def test_another_number_of_layers_starts_the_means_again() -> None:
    assert calm_radii((1.0, 2.0), (7.0, 8.0, 9.0)) == (7.0, 8.0, 9.0)


@pytest.mark.parametrize(
    ("calm", "layer", "tau"), [((), 0, 2.0), ((1.2,), 0, 2.0), ((5.0,), 0, 5.0), ((5.0,), 1, 2.0), ((1.0, 3.0), 1, 3.0)]
)
def test_tau_is_the_calm_radius_of_the_layer_and_at_least_the_least(
    calm: tuple[float, ...], layer: int, tau: float
) -> None:
    assert largest_radius(layer, calm, 2.0) == tau


@pytest.mark.parametrize(
    ("radius", "tau", "factor"),
    [
        (2.5, 2.0, 1.0 / 1.5),
        (3.0, 2.0, 0.5),
        (110.0, 2.0, 0.5),
        (2.000001, 2.0, 0.999999),
        (6.0, 5.0, 0.8),
        (100.0, 99.0, 98.0 / 99.0),
    ],
)
def test_a_factor_leads_to_tau_within_its_bounds(radius: float, tau: float, factor: float) -> None:
    (found,) = ceiling_factors((radius,), (tau,), (), 2.0).values()
    assert found == pytest.approx(factor)


@pytest.mark.parametrize(("radius", "factor"), [(1.8, 1.25), (1.5, 1.5), (1.0, 1.5), (0.3, 1.5), (2.0, 1.0)])
def test_the_ceiling_of_a_held_layer_below_tau_rises_again(radius: float, factor: float) -> None:
    assert ceiling_factors((radius,), (), (0,), 2.0) == pytest.approx({0: factor})
    assert ceiling_factors((radius,), (), (), 2.0) == {}


def test_layers_at_tau_and_below_are_left_alone() -> None:
    assert ceiling_factors((2.0, 1.1, 4.0, 4.1), (1.0, 1.0, 4.0, 4.0), (), 2.0).keys() == {3}


def test_of_many_layers_those_of_the_largest_radii_are_held() -> None:
    radii = [3.0 + layer for layer in range(MAX_HELD_LAYERS + 5)]
    assert list(ceiling_factors(radii, (), (0,), 2.0)) == list(range(5, MAX_HELD_LAYERS + 5))


@given(RADII, st.data())
def test_factors_are_always_within_the_bounds_of_a_message(radii: list[float], data: st.DataObject) -> None:
    calm = data.draw(st.lists(st.floats(0.0, 1e300), max_size=80))
    held = data.draw(st.sets(st.integers(0, 79)))
    factors = ceiling_factors(radii, calm, held, 2.0)
    assert len(factors) <= MAX_HELD_LAYERS
    assert all(0.0 < MIN_FACTOR <= each <= MAX_FACTOR <= MAX_CEILING_FACTOR for each in factors.values())
    assert all(layer in held or radii[layer] > largest_radius(layer, calm, 2.0) for layer in factors)
    assert all(map(math.isfinite, calm_radii(calm, radii)))
