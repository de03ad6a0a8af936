"""Update exponent: the degree of the growth of a layer's update with the state."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from koopmon.spectral import has_equal_lengths, update_exponent
from koopmon.spectral.update_exponent import stack_exponent


def states(num_samples: int = 4000, width: int = 32) -> tuple[Tensor, Tensor]:
    """Draw rows with lengths independent of their directions, and a matrix."""
    generator = torch.Generator().manual_seed(0)
    x = functional.normalize(torch.randn(num_samples, width, generator=generator, dtype=torch.float64))
    lengths = torch.exp(0.3 * torch.randn(num_samples, 1, generator=generator, dtype=torch.float64))
    return x * lengths, torch.randn(width, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_homogeneous_updates_have_their_degree(degree: int) -> None:
    x, matrix = states()
    length = x.norm(dim=1, keepdim=True)
    update = (x / length) @ matrix * length**degree
    # The term in the denominator lowers k by a known share. The varying directions add noise.
    share = x.norm(dim=1).log().var(correction=0)
    expected = degree * share / (share + 0.05 / 64)
    assert update_exponent(x, x + update).item() == pytest.approx(expected.item(), abs=0.02)


def test_states_of_one_length_and_zero_updates_have_exponent_zero() -> None:
    x, matrix = states()
    normal = functional.normalize(x)
    assert abs(update_exponent(normal, normal + normal @ matrix).item()) < 1e-3
    assert update_exponent(x, x).item() == pytest.approx(0.0, abs=1e-9)
    assert update_exponent(torch.zeros(4, 3), torch.ones(4, 3)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_gives_the_same_exponent(dtype: torch.dtype) -> None:
    x, matrix = states()
    y = x + x @ matrix
    assert update_exponent(x.to(dtype), y.to(dtype)).item() == pytest.approx(update_exponent(x, y).item(), abs=0.01)


def test_extreme_values_give_a_finite_exponent() -> None:
    x = torch.full((8, 4), 3e38)
    assert update_exponent(x, -x).item() == 0.0, "y - x overflows"
    for bad in (float("nan"), float("inf")):
        spoiled = torch.ones(8, 4)
        spoiled[3, 1] = bad
        assert update_exponent(spoiled, torch.zeros(8, 4)).item() == 0.0
        assert update_exponent(torch.ones(8, 4), spoiled).item() == 0.0


def test_samples_without_an_update_stay_within_the_bounds() -> None:
    x = torch.ones(100, 1024, dtype=torch.float64)
    x[:50] *= 1.01
    y = x.clone()
    y[:50] += 1.0
    assert update_exponent(x, y).item() == 100.0
    y = x.clone()
    y[50:] += 1.0
    assert update_exponent(x, y).item() == -100.0


def test_it_is_the_slope_of_the_logarithms_over_a_floored_variance() -> None:
    """In numpy, for lengths that vary little, where the floor counts."""
    draw = np.random.default_rng(0)
    for spread in (0.3, 0.03, 0.003):
        x = draw.standard_normal((50, 8))
        x *= np.exp(spread * draw.standard_normal((50, 1))) / np.linalg.norm(x, axis=1, keepdims=True)
        y = x + draw.standard_normal((50, 8)) * np.linalg.norm(x, axis=1, keepdims=True) ** 2
        lengths, updates = (np.log(np.linalg.norm(rows, axis=1)) for rows in (x, y - x))
        slope = np.cov(lengths, updates, bias=True)[0, 1] / (lengths.var() + 0.05 / (2 * 8))
        assert update_exponent(torch.tensor(x), torch.tensor(y)).item() == pytest.approx(slope, rel=1e-9)


def test_a_batch_of_layers_has_the_exponents_of_each() -> None:
    x, matrix = states(100)
    layers = torch.stack([x, x + x @ matrix, (x + x @ matrix) * x.norm(dim=1, keepdim=True) ** 3])
    both = update_exponent(layers[:-1], layers[1:]).tolist()
    assert both == pytest.approx([update_exponent(x, y).item() for x, y in pairwise(layers)])
    assert both[0] != pytest.approx(both[1], abs=0.1)


@pytest.mark.parametrize(
    ("exponents", "expected"),
    [
        ([0.7], 0.7),
        ([0.9, 0.1, 0.2], 0.2),
        ([0.1, 0.9, 0.8], 0.1),
        ([0.5, 0.2, 0.9], 0.5),
        ([0.9, 0.2, 0.4], 0.4),
        ([0.9, 0.2, 0.4, 0.8], 0.6),
        ([-1.0, 5.0], -1.0),
    ],
)
def test_a_stack_has_the_lower_of_its_first_layers_exponent_and_the_median(
    exponents: list[float], expected: float
) -> None:
    assert stack_exponent(exponents) == pytest.approx(expected)


def test_a_stack_without_layers_has_no_exponent() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        stack_exponent([])


def test_equal_lengths_are_those_behind_a_normalisation() -> None:
    x = torch.randn((256, 64), generator=torch.Generator().manual_seed(0))
    normalised = torch.nn.functional.layer_norm(x, (64,))
    assert has_equal_lengths([normalised, 3.0 * normalised])
    assert has_equal_lengths([torch.zeros(4, 8)])
    assert not has_equal_lengths([x]), "as a fresh embedding"
    assert not has_equal_lengths([normalised, x])
