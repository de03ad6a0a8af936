"""Principal coordinates against numpy, on both paths, and states without directions."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from koopmon.spectral import NonFiniteError, whitening
from koopmon.spectral.whitening import (
    Coordinates,
    centre,
    coordinates,
    ends,
    in_safe_range,
    largest_magnitudes,
    principal_coordinates,
    product_dtype,
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
        (300, 70, 4, "exact"),  # 5/4 of 7 blocks of 8 columns
        (300, 71, 4, "krylov"),
        (70, 300, 4, "exact"),
        (71, 300, 4, "krylov"),
        (512, 140, 32, "exact"),  # the call of the monitor
        (512, 141, 32, "krylov"),
        (300, 280, 63, "exact"),
        (300, 281, 63, "krylov"),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind", ["rank 1", "rank 3", "rank 20", "five columns", "seven tokens", "steep", "one dominates"]
)
def test_the_randomised_basis_of_a_degenerate_state_is_orthonormal(kind: str, dtype: torch.dtype) -> None:
    """The Krylov space holds all of the state early, and the later blocks are rounding errors."""
    x = normal(512, 200, seed=3)
    if kind.startswith("rank"):
        rank = int(kind[5:])
        x = x[:, :rank] @ normal(rank, 200, seed=4)
    elif kind == "five columns":
        x[:, 5:] = 0.0
    elif kind == "seven tokens":
        x = x[:7][torch.arange(512) % 7]
    elif kind == "steep":
        x = x * 0.5 ** torch.arange(200)
    else:
        x[:, 0] *= 1e6
    x = (x - x.mean(0)).to(dtype)
    basis, found = (each.double() for each in principal_coordinates(x, 32, seed=0))
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)[:32]
    present = int((values > 1e-5 * values[0]).sum())
    exact = 3e-5 if dtype == torch.float32 else 1e-8
    if kind != "one dominates":  # the others are a flat spectrum, which the basis holds nearly
        assert torch.linalg.vector_norm(found, dim=0)[:present].numpy() == pytest.approx(values[:present], rel=exact)
    frame = basis[:, :present]
    torch.testing.assert_close(frame.mT @ frame, torch.eye(present, dtype=torch.float64), rtol=0, atol=1e-5)


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
    """Each state of a batch has its own unit."""
    state = torch.tensor([[0.5, -0.25], [1.0, 0.75], [-1.0, 0.5]], dtype=torch.float64)
    both = torch.stack((magnitude * state, 3.0 * state))
    found = centre(both, [magnitude, 3.0], torch.float64)
    assert in_safe_range(magnitude) is (1e-9 < magnitude < 1e9)
    assert found.unit.tolist() == [1.0 if in_safe_range(magnitude) else magnitude, 1.0]
    wanted = (both / found.unit[:, None, None]).numpy()
    assert found.values.numpy() == pytest.approx(wanted - wanted.mean(1, keepdims=True), rel=1e-12)
    noise = 32 * np.finfo(float).eps * np.array([magnitude / found.unit[0].item(), 3.0])
    assert found.noise.numpy() == pytest.approx(noise)


def test_a_state_of_zeros_keeps_its_unit() -> None:
    found = centre(torch.zeros(1, 3, 2), [0.0], torch.float32)
    assert (found.unit.tolist(), found.noise.tolist()) == ([1.0], [0.0])
    assert found.values.dtype == torch.float32


def test_the_largest_magnitude_is_of_either_sign() -> None:
    states = [torch.tensor([[1.0, -3.0], [other, 0.5]]) for other in (2.0, 4.0)]
    assert largest_magnitudes(states, ["x", "y"]) == [3.0, 4.0]
    assert largest_magnitudes([torch.zeros(0, 4)] * 2, ["x", "y"]) == [0.0, 0.0]
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFiniteError, match=r"^states\[1\] holds NaN or infinite"):
            largest_magnitudes([torch.ones(2), torch.tensor([1.0, bad])], ["states[0]", "states[1]"])


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


def together(*states: Tensor, svd_rank: int, ridge: float = 1e-3, paired: bool = False) -> list[Coordinates]:
    """Return the groups of the transitions among `states`."""
    magnitudes = largest_magnitudes(states, [str(place) for place in range(len(states))])
    full = svd_rank >= states[0].shape[1]
    centred = centre(torch.stack(states), magnitudes, torch.float64 if full else product_dtype(*states))
    starts, stops = ends(paired=paired)
    return list(coordinates(centred.part(starts), centred.part(stops), svd_rank, ridge, seed=0))


def coordinates_of(x: Tensor, y: Tensor, svd_rank: int | None = None, ridge: float = 1e-3) -> Coordinates:
    """Return the coordinates of one transition, without the dimension of the layers."""
    (found,) = together(x, y, svd_rank=min(svd_rank or x.shape[1], x.shape[1]), ridge=ridge)
    assert found.layers == (0,)
    return Coordinates((0,), found.x[0], found.y[0], found.spread[0], found.ridge[0])


def test_a_transition_is_projected_onto_the_directions_of_its_input() -> None:
    x, y = decaying(50, 6, 0.7) + 3.0, normal(50, 6, seed=4)
    found = coordinates_of(x, y)
    right = np.linalg.svd((x - x.mean(0)).numpy())[2].T
    signs = np.sign((found.x.numpy() * ((x - x.mean(0)).numpy() @ right)).sum(0))
    assert found.x.numpy() == pytest.approx((x - x.mean(0)).numpy() @ right * signs, abs=1e-9)
    assert found.y.numpy() == pytest.approx((y - y.mean(0)).numpy() @ right * signs, abs=1e-9)
    assert found.spread.numpy() == pytest.approx(torch.linalg.vector_norm(found.x, dim=0).numpy())
    assert float(found.ridge) == 1e-3


@pytest.mark.parametrize("svd_rank", [1, 4, 6])
def test_as_many_directions_as_asked_for(svd_rank: int) -> None:
    assert coordinates_of(normal(50, 6, seed=5), normal(50, 6, seed=6), svd_rank).x.shape[1] == svd_rank


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("num_samples", "width", "svd_rank"), [(60, 12, 12), (60, 12, 5), (20, 90, 6), (120, 90, 6)])
def test_transitions_in_a_batch_have_the_coordinates_of_each_in_numpy(
    num_samples: int, width: int, svd_rank: int, paired: bool
) -> None:
    """Layers 1 and 3 lack directions; layer 2 has another unit."""
    states = [normal(num_samples, width, seed=30 + each) * 0.6 ** torch.arange(width) + each for each in range(6)]
    states[1] = states[1][:, :3] @ normal(3, width, seed=40)
    states[2] = 1e12 * states[2]
    states[3] = torch.full_like(states[3], 1 / 3)
    pairs = list(zip(states[::2], states[1::2], strict=True)) if paired else list(pairwise(states))
    groups = together(*states, svd_rank=svd_rank, paired=paired)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(pairs)))
    for group in groups:
        for row, layer in enumerate(group.layers):
            x, y = (state.numpy() - state.numpy().mean(0) for state in pairs[layer])
            largest = abs(pairs[layer][0].numpy()).max()
            unit = largest if largest > 1e9 else 1.0
            values, right = np.linalg.svd(x, full_matrices=False)[1:]
            count = int((values[:svd_rank] > max(1e-6 * values[0], 1e-12 * largest)).sum())
            frame = right[:count].T
            signs = np.sign((group.x[row].numpy() * (x @ frame)).sum(0))
            assert group.x.shape[2] == group.spread.shape[1] == count
            assert group.spread[row].numpy() * unit == pytest.approx(values[:count], rel=1e-6)
            assert group.x[row].numpy() * unit == pytest.approx(x @ frame * signs, abs=1e-6 * largest)
            assert group.y[row].numpy() * unit == pytest.approx(y @ frame * signs, abs=1e-6 * abs(y).max() + 1e-12)
            assert group.ridge[row].item() == pytest.approx(1e-3 / unit**2)


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
    assert (found.x.shape, found.y.shape, found.spread.shape) == ((num_samples, 0), (num_samples, 0), (0,))


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
