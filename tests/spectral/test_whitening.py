"""Principal coordinates against numpy, on both paths, and states without directions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from koopmon.spectral import whitening
from koopmon.spectral.whitening import (
    Coordinates,
    centre,
    largest_magnitude,
    principal_coordinates,
    product_dtype,
    transitions,
)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(num_samples: int, width: int, rate: float, seed: int = 0) -> Tensor:
    """Draw centred samples whose directions shrink by `rate` each."""
    x = normal(num_samples, width, seed=seed) * rate ** torch.arange(width, dtype=torch.float64)
    return (x - x.mean(0)) @ torch.linalg.qr(normal(width, width, seed=seed + 1)).Q


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the path of each call."""
    taken: list[str] = []
    krylov, eigh = whitening._krylov_coordinates, torch.linalg.eigh

    def counted(*arguments: object) -> tuple[Tensor, Tensor]:
        taken.append("krylov")
        return krylov(*arguments)  # type: ignore[arg-type]

    def exact(matrix: Tensor) -> object:
        taken.append("exact")
        return eigh(matrix)

    monkeypatch.setattr(whitening, "_krylov_coordinates", counted)
    monkeypatch.setattr(torch.linalg, "eigh", exact)
    return taken


@pytest.mark.parametrize(
    ("num_samples", "width", "svd_rank", "path"),
    [
        (300, 256, 4, "exact"),
        (300, 257, 4, "krylov"),
        (256, 300, 4, "exact"),
        (257, 300, 4, "krylov"),
        (600, 500, 143, "exact"),  # 7 blocks of 72 columns are more than 500
        (600, 505, 143, "krylov"),
        (600, 504, 143, "exact"),
        (40, 12, 4, "exact"),
    ],
)
def test_a_large_state_takes_the_randomised_path(
    num_samples: int, width: int, svd_rank: int, path: str, paths: list[str]
) -> None:
    x = normal(num_samples, width, seed=0)
    basis, coordinates = principal_coordinates(x - x.mean(0), svd_rank, seed=0)
    assert paths[0] == path
    assert (basis.shape, coordinates.shape) == ((width, svd_rank), (num_samples, svd_rank))


@pytest.mark.parametrize(("num_samples", "width"), [(60, 20), (20, 60), (30, 30), (400, 320), (320, 400)])
@pytest.mark.parametrize("svd_rank", [1, 5, 1000])
def test_coordinates_are_those_of_a_singular_value_decomposition(num_samples: int, width: int, svd_rank: int) -> None:
    x = decaying(num_samples, width, 0.8)
    basis, coordinates = principal_coordinates(x, svd_rank, seed=0)
    rank = min(svd_rank, num_samples, width)
    _, values, right = np.linalg.svd(x.numpy(), full_matrices=False)
    assert basis.shape == (width, rank)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(coordinates, x @ basis, rtol=0, atol=1e-9)
    known = values > 1e-5 * values[0]
    norms = torch.linalg.vector_norm(coordinates, dim=0).numpy()
    keep = known[:rank]
    assert norms[keep] == pytest.approx(values[:rank][keep], rel=1e-6)
    overlap = np.abs((basis.numpy() * right[:rank].T).sum(0))
    assert overlap[keep][:5] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("rate", "missing"), [(0.9, 1e-12), (0.97, 1e-4), (0.995, 0.03)])
def test_the_randomised_basis_keeps_nearly_all_that_an_exact_one_keeps(rate: float, missing: float) -> None:
    """The basis holds the variance of 16 directions, also for a slowly decaying spectrum."""
    x = decaying(500, 400, rate)
    _, coordinates = principal_coordinates(x, 16, seed=0)
    best = torch.linalg.svdvals(x)[:16].square().sum()
    assert 1 - missing <= (coordinates.square().sum() / best).item() <= 1 + 1e-9


def test_one_direction_that_dwarfs_the_others_leaves_them_orthogonal() -> None:
    x = normal(400, 300, seed=3) * torch.cat([torch.tensor([1e6]), torch.ones(299)]).double()
    basis, _ = principal_coordinates(x - x.mean(0), 12, seed=0)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_batch_of_states_has_the_coordinates_of_each() -> None:
    x = torch.stack([decaying(400, 300, 0.8, seed=each) for each in (5, 7)])
    basis, coordinates = principal_coordinates(x, 6, seed=2)
    for index in range(2):
        alone, own = principal_coordinates(x[index], 6, seed=2)
        assert (basis[index].mT @ alone).abs().diagonal().numpy() == pytest.approx(1.0, abs=1e-8)
        assert coordinates[index].abs().numpy() == pytest.approx(own.abs().numpy(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_has_the_precision_of_the_states_and_coordinates_are_double(dtype: torch.dtype) -> None:
    for width in (20, 300):
        basis, coordinates = principal_coordinates(decaying(400, width, 0.9).to(dtype), 4, seed=0)
        assert (basis.dtype, coordinates.dtype) == (dtype, torch.float64)


# Units


@pytest.mark.parametrize("magnitude", [1e-300, 1e-9, 1.5e-9, 1.0, 9e8, 1e9, 1e300])
def test_a_state_is_centred_in_a_unit_whose_squares_are_finite(magnitude: float) -> None:
    state = magnitude * torch.tensor([[0.5, -0.25], [1.0, 0.75], [-1.0, 0.5]], dtype=torch.float64)
    found = centre(state, magnitude, torch.float64)
    assert found.unit == (1.0 if 1e-9 < magnitude < 1e9 else magnitude)
    wanted = (state / found.unit).numpy()
    assert found.values.numpy() == pytest.approx(wanted - wanted.mean(0), rel=1e-12)
    assert found.noise == pytest.approx(32 * np.finfo(float).eps * magnitude / found.unit)


def test_a_state_of_zeros_keeps_its_unit() -> None:
    found = centre(torch.zeros(3, 2), 0.0, torch.float32)
    assert (found.unit, found.noise) == (1.0, 0.0)
    assert found.values.dtype == torch.float32


def test_the_largest_magnitude_is_of_either_sign() -> None:
    assert largest_magnitude(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), "x") == 3.0
    assert largest_magnitude(torch.tensor([[1.0, -3.0], [4.0, 0.5]]), "x") == 4.0
    assert largest_magnitude(torch.zeros(0, 4), "x") == 0.0
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"^states\[2\] holds NaN or infinite"):
            largest_magnitude(torch.tensor([1.0, bad]), "states[2]")


def test_products_are_in_double_precision_where_float32_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert product_dtype(single, single) == torch.float32
    assert product_dtype(single.bfloat16()) == torch.float32
    assert product_dtype(single, double) == torch.float64
    for precision, dtype in (("highest", torch.float32), ("high", torch.float64), ("medium", torch.float64)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert product_dtype(single) == dtype

    def different() -> str:
        raise RuntimeError("the backends differ")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", different)
    assert product_dtype(single) == torch.float64


# Transitions


def coordinates_of(x: Tensor, y: Tensor, svd_rank: int | None = None, ridge: float = 1e-3) -> Coordinates:
    (found,) = transitions([x, y], ["x", "y"], svd_rank, ridge, seed=0, paired=False)
    return found


def test_a_transition_is_projected_onto_the_directions_of_its_input() -> None:
    x, y = decaying(50, 6, 0.7) + 3.0, normal(50, 6, seed=4)
    found = coordinates_of(x, y)
    right = np.linalg.svd((x - x.mean(0)).numpy())[2].T
    signs = np.sign((found.x.numpy() * ((x - x.mean(0)).numpy() @ right)).sum(0))
    assert found.x.numpy() == pytest.approx((x - x.mean(0)).numpy() @ right * signs, abs=1e-9)
    assert found.y.numpy() == pytest.approx((y - y.mean(0)).numpy() @ right * signs, abs=1e-9)
    assert found.spread.numpy() == pytest.approx(torch.linalg.vector_norm(found.x, dim=0).numpy())
    assert (found.size, float(found.ridge)) == (6, 1e-3)


@pytest.mark.parametrize(("svd_rank", "size"), [(None, 6), (4, 4), (6, 6), (9, 6)])
def test_as_many_directions_as_asked_for_and_no_more_than_the_width(svd_rank: int | None, size: int) -> None:
    found = coordinates_of(normal(50, 6, seed=5), normal(50, 6, seed=6), svd_rank)
    assert found.size == found.x.shape[1] == size


def test_units_of_input_and_output_are_the_inputs() -> None:
    """Both states have their own units if their squares would not be finite."""
    x, y = normal(30, 3, seed=7), normal(30, 3, seed=8)
    plain = coordinates_of(x, y)
    for one, other in ((1e200, 1.0), (1.0, 1e200), (1e-200, 1e-200), (1e200, 1e150)):
        found = coordinates_of(one * x, other * y, ridge=1e-3)
        unit = 1.0 if one == 1.0 else float((one * x).abs().max())
        assert found.x.abs().numpy() == pytest.approx((plain.x.abs() * one / unit).numpy(), rel=1e-9)
        assert found.y.abs().numpy() == pytest.approx((plain.y.abs() * (other / unit)).numpy(), rel=1e-9)
        assert float(found.ridge) == pytest.approx(1e-3 / unit / unit)


@pytest.mark.parametrize("num_samples", [0, 1])
def test_without_two_samples_there_are_no_directions(num_samples: int) -> None:
    found = coordinates_of(normal(num_samples, 4, seed=9), normal(num_samples, 4, seed=10))
    assert (found.x.shape, found.y.shape, found.spread.shape, found.size) == (
        (num_samples, 0),
        (num_samples, 0),
        (0,),
        4,
    )
    assert float(found.ridge) == 0.0


def test_two_samples_have_one_direction() -> None:
    found = coordinates_of(normal(2, 4, seed=11), normal(2, 4, seed=12))
    assert found.x.shape == (2, 1)


def test_rounding_errors_of_the_mean_are_no_direction() -> None:
    """Five centred samples span four directions. The error of a float32 mean of 10,000 is far above 1e-6."""
    x, y = 1e4 + normal(5, 8, seed=21), normal(5, 8, seed=22)
    assert coordinates_of(x.float(), y.float(), 6).x.shape == (5, 4)


@pytest.mark.parametrize(("noise", "num_directions"), [(1.0, 0), (15.0, 0), (60.0, 4), (1000.0, 4)])
def test_rounding_noise_of_a_constant_is_no_spread(noise: float, num_directions: int) -> None:
    x = 1e6 * torch.ones(40, 4, dtype=torch.float64)
    x += noise * 1e6 * torch.finfo(torch.float64).eps * normal(40, 4, seed=13)
    assert coordinates_of(x, normal(40, 4, seed=14)).x.shape[1] == num_directions


def test_present_directions_are_a_leading_run() -> None:
    frame = torch.linalg.qr(normal(60, 4, seed=15)).Q
    frame = torch.linalg.qr(frame - frame.mean(0)).Q
    x = frame * torch.tensor([1.0, 0.5, 1e-7, 1e-8], dtype=torch.float64)
    assert coordinates_of(x, normal(60, 4, seed=16)).x.shape[1] == 2


def test_a_truncated_basis_computes_in_the_precision_of_the_states() -> None:
    x, y = normal(400, 300, seed=17).float(), normal(400, 300, seed=18).float()
    single = coordinates_of(x, y, 4)
    double = coordinates_of(x.double(), y.double(), 4)
    assert not torch.equal(single.x.abs(), double.x.abs())
    assert single.x.dtype == single.y.dtype == torch.float64
    full = coordinates_of(x[:, :20], y[:, :20])
    assert torch.equal(full.x, coordinates_of(x[:, :20].double(), y[:, :20].double()).x), "full rank is double"


def test_a_rank_of_the_whole_width_is_full_rank() -> None:
    x, y = normal(50, 20, seed=19).float(), normal(50, 20, seed=20).float()
    double = coordinates_of(x.double(), y.double())
    for svd_rank in (20, 30):
        assert torch.equal(coordinates_of(x, y, svd_rank).x, double.x)
    assert not torch.equal(coordinates_of(x, y, 19).x.abs(), double.x[:, :19].abs())
