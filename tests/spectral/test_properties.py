"""Properties for any states: symmetries of the spectrum, and bounds of every number."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from koopmon.spectral import FIELDS, kss_basis, kss_gradient, profile_states, profile_transition

SEEDS = st.integers(0, 2**31)
WIDTHS = st.integers(1, 7)


def transition(seed: int, width: int) -> tuple[Tensor, Tensor]:
    """Build x, y (60, D) from a random linear map, a nonlinearity and noise, away from the origin."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(60, width) * torch.linspace(1.0, 0.2, width, dtype=torch.float64) + draw(width)
    return x, x @ draw(width, width) / width**0.5 + 0.3 * torch.tanh(x) + 0.1 * draw(60, width)


def distance(first: Tensor, second: Tensor) -> float:
    cost = (first[:, None] - second[None, :]).abs().numpy()
    return float(cost[linear_sum_assignment(cost)].max())


@settings(max_examples=40)
@given(seed=SEEDS, width=WIDTHS, truncated=st.booleans())
@example(seed=67363063, width=5, truncated=True)
def test_masses_and_ratios_stay_in_their_bounds(seed: int, width: int, truncated: bool) -> None:
    x, y = transition(seed, width)
    profile = profile_states([x, y, x], svd_rank=max(1, width // 2) if truncated else None)
    for layer in profile.layers:
        assert all(math.isfinite(getattr(layer, name)) for name in FIELDS)
        masses = (layer.near_unit_mass, layer.expansive_mass, layer.contractive_mass)
        assert min(masses) >= 0.0
        assert sum(masses) <= 1.0 + 1e-12
        assert 0.0 <= layer.reliable_mode_ratio <= 1.0
        assert 0.0 <= layer.reliable_near_unit_mass <= 1.0
        assert layer.eigenvector_condition_number >= 1.0 - 1e-12
        assert layer.kreiss_constant is not None
        assert 1.0 <= layer.kreiss_constant <= layer.eigenvector_condition_number * (1 + 1e-6)
        # The modulus of many layers at once differs in the last bit from that of one layer.
        assert layer.spectral_radius == pytest.approx(layer.eigenvalues.abs().max().item(), rel=1e-14)
    assert profile.risk is not None
    assert 0.0 <= profile.risk <= 1.0


@settings(max_examples=25)
@given(seed=SEEDS, width=WIDTHS, factor=st.floats(0.01, 100.0))
def test_scaling_y_scales_the_eigenvalues_and_scaling_both_does_not(seed: int, width: int, factor: float) -> None:
    x, y = transition(seed, width)
    plain = profile_transition(x, y, kreiss="never").eigenvalues
    tolerance = 1e-8 * plain.abs().max().item()
    scaled = profile_transition(x, factor * y, kreiss="never").eigenvalues
    assert distance(scaled / factor, plain) < tolerance
    both = profile_transition(factor * x, factor * y, kreiss="never").eigenvalues
    assert distance(both, plain) < tolerance


@settings(max_examples=25)
@given(seed=SEEDS, width=WIDTHS)
def test_neither_the_order_of_samples_nor_the_origin_matters(seed: int, width: int) -> None:
    x, y = transition(seed, width)
    plain = profile_transition(x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    moved = profile_transition(x[order] + 7.0, y[order] - 3.0)
    assert distance(moved.eigenvalues, plain.eigenvalues) < 1e-8 * plain.spectral_radius
    for name in FIELDS:
        if name not in ("update_exponent", "stream_rms"):  # they depend on the distances of the states from the origin
            assert getattr(moved, name) == pytest.approx(getattr(plain, name), rel=1e-3, abs=1e-9), name


@settings(max_examples=25)
@given(seed=SEEDS, width=st.integers(2, 7))
def test_the_kss_gradient_moves_no_mean_and_stays_in_the_basis(seed: int, width: int) -> None:
    """The operator uses centred states in the basis only, so the gradient is orthogonal to everything else."""
    x, y = transition(seed, width)
    basis = kss_basis(x, max(1, width // 2))
    found = kss_gradient(x, y, basis, tau_u=0.5)
    outside = torch.eye(width, dtype=torch.float64) - basis @ basis.mT
    for gradient in (found.grad_x, found.grad_y):
        scale = gradient.abs().max() + 1e-300
        assert gradient.sum(0).abs().max() < 1e-10 * scale
        assert (gradient @ outside).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_process_with_inexact_float32_products_keeps_its_spectrum(precision: str) -> None:
    """Training scripts set this. The products of a truncated profile then use float64."""
    x, y = (state.float() for state in transition(3, 7))
    before = torch.get_float32_matmul_precision()
    exact = profile_transition(x.double(), y.double(), svd_rank=4)
    basis = kss_basis(x, 4)
    wanted = kss_gradient(x.double(), y.double(), basis.double())
    try:
        torch.set_float32_matmul_precision(precision)
        found = profile_transition(x, y, svd_rank=4)
        gradient = kss_gradient(x, y, basis)
    finally:
        torch.set_float32_matmul_precision(before)
    assert distance(found.eigenvalues, exact.eigenvalues) < 1e-12
    assert gradient.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12)


def test_the_thread_count_and_grad_mode_are_unchanged() -> None:
    x, y = transition(4, 5)
    x.requires_grad_()
    threads = torch.get_num_threads()
    profile = profile_transition(x, y)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert not profile.eigenvalues.requires_grad
    assert np.isfinite(profile.spectral_radius)
