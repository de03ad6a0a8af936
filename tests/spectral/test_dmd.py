"""Eigenvalues of the whitened operator against PyDMD and known spectra, and their invariances."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("pydmd")
pytest.importorskip("scipy")

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydmd import DMD
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from koopmon.spectral import FIELDS, LayerProfile, profile_states, profile_transition
from koopmon.spectral.dmd import fit, sorted_eig

torch.set_num_threads(1)

WIDTH = 16


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed)).Q


def set_distance(found: Tensor | np.ndarray, wanted: Tensor | np.ndarray) -> float:
    """Return the largest distance in the best one-to-one matching of two sets of eigenvalues."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    distances = np.abs(found[:, None] - wanted[None, :])
    rows, columns = linear_sum_assignment(distances)
    return float(distances[rows, columns].max())


def oracle(x: Tensor, y: Tensor, svd_rank: int = -1) -> np.ndarray:
    """Return PyDMD's eigenvalues of centred data; the rank -1 is full rank."""
    dmd = DMD(svd_rank=svd_rank)
    dmd.operator.compute_operator((x - x.mean(0)).T.numpy(), (y - y.mean(0)).T.numpy())
    return dmd.operator.eigenvalues


def random_system() -> Tensor:
    return normal(WIDTH, WIDTH, seed=1) / WIDTH**0.5


def non_normal_system() -> Tensor:
    """Build an operator with distinct eigenvalues and a large strictly upper part, in a rotated basis."""
    turn = orthogonal(WIDTH, seed=2)
    triangle = torch.diag(torch.linspace(0.3, 1.2, WIDTH, dtype=torch.float64))
    return turn @ (triangle + torch.diag(torch.full((WIDTH - 1,), 0.5, dtype=torch.float64), 1)) @ turn.T


def rotation_system() -> Tensor:
    """Build rotations of planes by different angles, with moduli close to 1."""
    pairs = WIDTH // 2
    angle, modulus = torch.linspace(0.2, 2.9, pairs).double(), torch.linspace(0.92, 1.04, pairs).double()
    blocks = [
        m * torch.stack((torch.stack((a.cos(), -a.sin())), torch.stack((a.sin(), a.cos()))))
        for a, m in zip(angle, modulus, strict=True)
    ]
    turn = orthogonal(WIDTH, seed=3)
    return turn @ torch.block_diag(*blocks) @ turn.T


def near_identity_system() -> Tensor:
    return torch.eye(WIDTH, dtype=torch.float64) + 0.05 * normal(WIDTH, WIDTH, seed=4) / WIDTH**0.5


SYSTEMS = [random_system, non_normal_system, rotation_system, near_identity_system]


def uneven_samples(num_samples: int = 300, seed: int = 5) -> Tensor:
    """Draw x (N, D) away from the origin, with directions of very different size."""
    scale = torch.logspace(0, -2, WIDTH, dtype=torch.float64)
    return (normal(num_samples, WIDTH, seed=seed) * scale) @ orthogonal(WIDTH, seed=6) + 3.0


@pytest.mark.parametrize("system", SYSTEMS)
def test_an_exact_linear_map_gives_its_own_spectrum(system: Callable[[], Tensor]) -> None:
    x = uneven_samples()
    y = x @ system().T - 1.5
    profile = profile_transition(x, y, kreiss="never")
    wanted = torch.linalg.eigvals(system())
    assert set_distance(profile.eigenvalues, wanted) < 1e-6
    assert set_distance(profile.eigenvalues, oracle(x, y)) < 1e-6
    assert set_distance(profile.eigenvalues, 1.001 * wanted) > 1e-5


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("svd_rank", [None, 5])
def test_with_noise_the_spectrum_equals_that_of_pydmd(system: Callable[[], Tensor], svd_rank: int | None) -> None:
    x = uneven_samples()
    y = x @ system().T + 0.1 * torch.tanh(normal(300, WIDTH, seed=7)) + 0.3 * x.sin()
    profile = profile_transition(x, y, svd_rank=svd_rank, kreiss="never")
    assert set_distance(profile.eigenvalues, oracle(x, y, svd_rank or -1)) < 1e-6


def test_eigenvalues_are_sorted_and_pairs_stay_together() -> None:
    x = uneven_samples()
    values = profile_transition(x, x @ random_system().T, kreiss="never").eigenvalues
    modulus = values.abs()
    assert (modulus[:-1] >= modulus[1:] - 1e-12).all()
    firsts = [index for index, value in enumerate(values.tolist()) if value.imag > 0]
    assert firsts
    for index in firsts:
        assert values[index + 1] == values[index].conj()


def decaying_transition() -> tuple[Tensor, Tensor]:
    """Build x, y (400, 300) with slow modes in the large directions and decreasing coupling to the small ones."""
    width, num_samples = 300, 400
    index = torch.arange(width, dtype=torch.float64)
    turn = orthogonal(width, seed=8)
    operator = torch.diag(torch.cat((torch.linspace(1.6, 1.2, 5).double(), torch.full((width - 5,), 0.5).double())))
    operator += normal(width, width, seed=9) * 0.8 ** (index[:, None] + index[None, :])
    x = normal(num_samples, width, seed=10) * (0.9**index).clamp_min(0.01)
    return x @ turn, x @ operator.T @ turn


def test_the_randomised_path_converges_to_the_full_one_as_the_rank_grows() -> None:
    x, y = decaying_transition()
    full = profile_transition(x, y, kreiss="never").eigenvalues[:5]
    errors = []
    for svd_rank in (8, 16, 24, 32):
        found = profile_transition(x, y, svd_rank=svd_rank, kreiss="never").eigenvalues
        errors.append(set_distance(found[:5], full))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-2 * errors[0]


def test_the_randomised_basis_is_the_exact_one_to_rounding() -> None:
    x, y = decaying_transition()
    found = profile_transition(x, y, svd_rank=16, kreiss="never")
    assert set_distance(found.eigenvalues, oracle(x, y, 16)) < 1e-6


def test_truncation_at_the_width_is_the_full_operator() -> None:
    x = uneven_samples()
    y = x @ non_normal_system().T + 0.2 * x.sin()
    full, truncated = (profile_transition(x, y, svd_rank=rank, kreiss="never") for rank in (None, WIDTH))
    assert set_distance(truncated.eigenvalues, full.eigenvalues) < 1e-9


def test_only_the_seed_changes_the_randomised_basis() -> None:
    x, y = (state.float() for state in decaying_transition())

    def eigenvalues(seed: int) -> Tensor:
        return profile_transition(x, y, svd_rank=20, seed=seed, kreiss="never").eigenvalues

    first = eigenvalues(0)
    torch.manual_seed(1234)
    assert torch.equal(eigenvalues(0), first)
    assert not torch.equal(eigenvalues(1), first)
    assert set_distance(eigenvalues(1), first) < 1e-2


def test_the_global_random_state_is_untouched() -> None:
    x, y = decaying_transition()
    before = torch.get_rng_state()
    profile_transition(x, y, svd_rank=20)
    profile_transition(x[:, :20], y[:, :20])
    assert torch.equal(torch.get_rng_state(), before)


def assert_same(first: LayerProfile, second: LayerProfile, tolerance: float) -> None:
    assert set_distance(first.eigenvalues, second.eigenvalues) < tolerance
    for name in FIELDS:
        if name != "kreiss_constant":
            assert getattr(first, name) == pytest.approx(getattr(second, name), rel=tolerance), name


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), width=st.integers(2, 8), truncated=st.booleans())
def test_profiles_do_not_depend_on_the_orthogonal_frame(seed: int, width: int, truncated: bool) -> None:
    x = normal(60, width, seed=seed) * torch.logspace(0, -1, width, dtype=torch.float64)
    y = x @ normal(width, width, seed=seed + 1) + 0.3 * normal(60, width, seed=seed + 2)
    frame = orthogonal(width, seed=seed + 3)
    svd_rank = max(1, width // 2) if truncated else None
    plain = profile_transition(x, y, svd_rank=svd_rank, kreiss="never")
    turned = profile_transition(x @ frame, y @ frame, svd_rank=svd_rank, kreiss="never")
    assert_same(turned, plain, 1e-6)


@pytest.mark.parametrize("svd_rank", [None, 6])
def test_a_batch_of_layers_equals_layer_by_layer(svd_rank: int | None) -> None:
    states = [uneven_samples(seed=11)]
    for system in SYSTEMS:
        states.append(states[-1] @ system().T + 0.1 * states[-1].sin())
    together = profile_states(states, svd_rank=svd_rank)
    stacked = profile_states(torch.stack(states), svd_rank=svd_rank)
    assert together.num_layers == stacked.num_layers == len(SYSTEMS)
    for index, (layer, other) in enumerate(zip(together.layers, stacked.layers, strict=True)):
        alone = profile_transition(states[index], states[index + 1], svd_rank=svd_rank)
        assert_same(layer, alone, 1e-9)
        assert_same(other, alone, 1e-9)
        assert layer.kreiss_constant == pytest.approx(alone.kreiss_constant, rel=1e-3)


def test_eigenvalues_are_sorted_by_modulus_and_then_by_real_part() -> None:
    values, vectors = sorted_eig(torch.diag(torch.tensor([-1.0, 0.5, 1.0, -2.0, 2.0], dtype=torch.float64)))
    assert values.real.tolist() == [2.0, -2.0, 1.0, -1.0, 0.5]
    assert vectors.real.abs().argmax(0).tolist() == [4, 3, 2, 0, 1], "the vectors go with them"
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    values, vectors = sorted_eig(torch.block_diag(torch.eye(1), turn, -torch.eye(1)).double())
    assert torch.view_as_real(values).tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [-1.0, 0.0]]


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 8))
def test_sorted_vectors_belong_to_their_values(seed: int, size: int) -> None:
    operator = normal(3, size, size, seed=seed)
    values, vectors = sorted_eig(operator)
    moved = operator.to(vectors.dtype) @ vectors
    torch.testing.assert_close(moved, vectors * values[:, None, :], rtol=1e-8, atol=1e-8)
    assert (values.abs().diff(dim=-1) <= 1e-9).all()


def reference(x: np.ndarray, y: np.ndarray, ridge: float) -> dict[str, np.ndarray]:
    """Eqs. 5 to 10 in numpy for centred samples in principal coordinates; rows are samples."""
    gain = 1.0 / np.sqrt((x**2).sum(0) / (len(x) - 1) + ridge)
    x_w, y_w = x * gain, y * gain
    operator = np.linalg.lstsq(x_w, y_w, rcond=None)[0].T
    error = y_w - x_w @ operator.T
    values, left = np.linalg.eig(operator.T)
    left = left / np.linalg.norm(left, axis=0)
    residuals = [np.linalg.norm(error @ u) / (np.linalg.norm(x_w @ u) + 1e-5) for u in left.T]
    change = np.linalg.norm(y_w - x_w)
    return {
        "operator": operator,
        "values": values,
        "residuals": np.array(residuals),
        "nonlinearity": np.linalg.norm(error) / (change + 1e-5),
        "update": change / np.linalg.norm(x_w),
    }


@pytest.mark.parametrize("noise", [0.0, 1e-5, 0.1])
@pytest.mark.parametrize("ridge", [0.0, 1e-5, 0.5, 1e9])
def test_a_fit_is_the_paper_in_numpy(noise: float, ridge: float) -> None:
    """Two transitions at once, with conjugate pairs, and errors and states as small as the epsilon of eq. 10."""
    frames = [
        torch.linalg.qr(normal(50, 5, seed=20 + each) - normal(50, 5, seed=20 + each).mean(0)).Q for each in (0, 1)
    ]
    x = torch.stack([torch.linalg.qr(frame - frame.mean(0)).Q for frame in frames])
    spread = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.1], [9.0, 1.0, 0.9, 0.8, 0.7]], dtype=torch.float64)
    x = x * spread[:, None, :]
    y = x @ (normal(2, 5, 5, seed=22) / 2) + noise * normal(2, 50, 5, seed=23)
    found = fit(x, y, spread, torch.tensor([ridge, ridge / 2], dtype=torch.float64))
    assert found.finite.all()
    for layer, eps in enumerate((ridge, ridge / 2)):
        wanted = reference(x[layer].numpy(), y[layer].numpy(), eps)
        assert found.operator[layer].numpy() == pytest.approx(wanted["operator"], rel=1e-7, abs=1e-9)
        assert set_distance(found.eigenvalues[layer], wanted["values"]) < 1e-8
        order = [int(np.abs(wanted["values"].conj() - value).argmin()) for value in found.eigenvalues[layer].numpy()]
        matched = wanted["residuals"][order]
        assert found.residuals[layer].numpy() == pytest.approx(matched, rel=1e-5, abs=1e-9)
        assert found.nonlinearity[layer].item() == pytest.approx(wanted["nonlinearity"], rel=1e-6, abs=1e-9)
        assert found.update[layer].item() == pytest.approx(wanted["update"], rel=1e-9)


def test_an_overflow_marks_its_layer_alone() -> None:
    x = torch.linalg.qr(normal(40, 3, seed=30)).Q.expand(2, -1, -1)
    y = torch.stack([x[0], 1e300 * x[1]])
    spread = torch.ones(2, 3, dtype=torch.float64)
    found = fit(x, y, spread, torch.zeros(2, dtype=torch.float64))
    assert found.finite.tolist() == [True, False]
    assert torch.equal(found.operator[1], torch.eye(3, dtype=torch.float64))
    assert (found.residuals >= 0).all(), "infinite where it is not defined, and never NaN"


def test_residuals_of_directions_that_the_ridge_shrinks() -> None:
    """A diagonal operator: the left eigenvector of the weak direction sees that direction alone."""
    x = torch.linalg.qr(normal(50, 3, seed=31) - normal(50, 3, seed=31).mean(0)).Q
    spread = torch.tensor([3.0, 1.0, 0.05], dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0)).Q * spread
    y = x * torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64) + 1e-4 * normal(50, 3, seed=32)
    found = fit(x[None], y[None], spread[None], torch.tensor([0.5], dtype=torch.float64))
    wanted = reference(x.numpy(), y.numpy(), 0.5)
    order = [int(np.abs(wanted["values"] - value).argmin()) for value in found.eigenvalues[0].numpy()]
    assert found.residuals[0].numpy() == pytest.approx(wanted["residuals"][order], rel=1e-5)


@pytest.mark.parametrize(("scale", "unit"), [(1e200, 1.0), (1e307, 1e-5)], ids=["of an error", "of the operator"])
def test_an_overflow_in_one_column_is_an_overflow(scale: float, unit: float) -> None:
    x = torch.linalg.qr(normal(40, 3, seed=33)).Q
    y = x + 0.1 * normal(40, 3, seed=34)
    y[:, 0] *= scale
    spread = torch.full((1, 3), unit, dtype=torch.float64)
    found = fit(unit * x[None], y[None], spread, torch.zeros(1, dtype=torch.float64))
    assert found.finite.tolist() == [False]
    assert torch.equal(found.operator[0], torch.eye(3, dtype=torch.float64))
