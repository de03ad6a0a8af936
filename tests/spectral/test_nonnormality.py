"""Kreiss constant and eigenvector condition number against closed forms and a dense search of SVDs."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("scipy.optimize")

import numpy as np
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from koopmon.spectral import kreiss_constant, nonnormality, profile_states, profile_transition
from koopmon.spectral.nonnormality import (
    CONDITION_LIMIT,
    KREISS_ACCURACY,
    _Search,
    condition_number,
    real_eigenvectors,
)


def dense_kreiss(a: np.ndarray) -> float:
    """Maximise (|z| - 1) / sigma_min(zI - B) over |z| > 1, B = A / max(1, rho), by a grid of SVDs and Nelder-Mead."""
    b = a / max(1.0, np.abs(np.linalg.eigvals(a)).max())
    identity = np.eye(len(b))

    def value(point: np.ndarray) -> float:
        gap = math.exp(max(point[0], math.log(1e-6)))
        z = (1 + gap) * np.exp(1j * point[1])
        return float(gap / np.linalg.svd(z * identity - b, compute_uv=False)[-1])

    log_gaps = np.linspace(math.log(1e-6), math.log(20 * max(1.0, np.linalg.norm(b, 2))), 36)
    angles = np.union1d(np.linspace(0, np.pi, 61), np.abs(np.angle(np.linalg.eigvals(b))))
    z = (1 + np.exp(log_gaps))[:, None] * np.exp(1j * angles)[None, :]
    smallest = np.linalg.svd(z[..., None, None] * identity - b, compute_uv=False)[..., -1]
    grid = np.exp(log_gaps)[:, None] / smallest
    best = 1.0
    for flat in np.argsort(-grid.ravel())[:40:8]:
        row, column = np.unravel_index(flat, grid.shape)
        found = minimize(lambda p: -value(p), [log_gaps[row], angles[column]], method="Nelder-Mead")
        best = max(best, grid[row, column], -found.fun)
    return best


def plane(radius: float, angle: float, skew: float) -> np.ndarray:
    """A rotation by `angle` that stretches one axis and shrinks the other by `skew`."""
    turn = radius * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.diag([skew, 1.0]) @ turn @ np.diag([1 / skew, 1.0])


def operators() -> dict[str, np.ndarray]:
    """Return operators of every kind that a layer may have, and classical hard cases."""
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    skewed = rng.standard_normal((12, 12))
    return {
        "Gaussian, rho about 1": rng.standard_normal((24, 24)) / np.sqrt(24),
        "Gaussian, damped": 0.8 * rng.standard_normal((16, 16)) / 4,
        "near the identity": np.eye(24) + 0.1 * rng.standard_normal((24, 24)) / np.sqrt(24),
        "real eigenvalues, skewed": skewed @ np.diag(rng.uniform(0.5, 1.2, 12)) @ np.linalg.inv(skewed),
        "upper triangular": 0.3 * np.triu(rng.standard_normal((16, 16))),
        "orthogonal plus rank one": 0.97 * turn + 0.05 * np.outer(rng.standard_normal(16), rng.standard_normal(16)),
        "Jordan block of 0.9": 0.9 * np.eye(8) + 0.05 * np.eye(8, k=1),
        "Jordan block of 0.5": 0.5 * np.eye(16) + 0.6 * np.eye(16, k=1),
        "Grcar": -np.eye(16, k=-1) + sum(np.eye(16, k=k) for k in range(4)),
        "expansive": 3.0 * rng.standard_normal((10, 10)),
        "negative real, skewed": -skewed @ np.diag(np.linspace(0.3, 0.999, 12)) @ np.linalg.inv(skewed),
        "far from the circle": 4.0 * np.eye(4, k=1),
        "just inside the circle": np.diag([1 - 1e-5, 0.9, 0.5]) + np.diag([3.0, 2.0], 1),
        "two planes near the circle": scipy.linalg.block_diag(plane(1.0, 2.0, 5.0), plane(0.999, 0.7, 4.0)),
        "more angles than the search takes": rng.standard_normal((67, 67)) / np.sqrt(67),
    }


@functools.cache
def dense_kreiss_of(name: str) -> float:
    return dense_kreiss(operators()[name])


@pytest.mark.parametrize("name", operators())
def test_the_stated_accuracy_holds_against_a_dense_search(name: str) -> None:
    found, wanted = kreiss_constant(torch.tensor(operators()[name])).item(), dense_kreiss_of(name)
    assert (1 - KREISS_ACCURACY) * wanted <= found <= wanted * (1 + 1e-6)


def test_the_operators_have_different_constants() -> None:
    """A constant function would pass if all constants were equal."""
    constants = [dense_kreiss_of(name) for name in operators()]
    assert min(constants) == pytest.approx(1.0, abs=1e-6)
    assert max(constants) > 10


def test_a_nilpotent_block_has_its_closed_form() -> None:
    """A = [[0, b], [0, 0]]: the resolvent at |z| = s has the norm of [[1/s, b/s^2], [0, 1/s]]."""
    for strength in (0.5, 3.0, 50.0):
        gaps = np.geomspace(1e-6, 1e5, 400_001)
        ratio = strength / (1 + gaps)
        norms = (ratio + np.sqrt(ratio**2 + 4)) / 2 / (1 + gaps)
        operator = torch.tensor([[0.0, strength], [0.0, 0.0]])
        assert kreiss_constant(operator).item() == pytest.approx(max(1.0, (gaps * norms).max()), rel=KREISS_ACCURACY)


def test_a_simple_eigenvalue_on_the_circle_gives_at_least_its_own_condition_number() -> None:
    """lambda = 1 with left and right vectors at an angle: (|z| - 1) ||R|| tends to 1 / |u* v| as z tends to 1."""
    for skew in (1.0, 10.0, 300.0):
        operator = np.array([[1.0, skew], [0.0, 0.2]])
        own = math.hypot(1.0, skew / 0.8)
        found = kreiss_constant(torch.tensor(operator)).item()
        assert found >= own * (1 - KREISS_ACCURACY)
        assert found == pytest.approx(dense_kreiss(operator), rel=KREISS_ACCURACY)


def test_a_defective_eigenvalue_on_the_circle_gives_a_large_finite_number() -> None:
    """The supremum is infinite there."""
    found = kreiss_constant(torch.tensor([[1.0, 1.0], [0.0, 1.0]])).item()
    assert 1e3 < found < float("inf")


def test_an_expansive_operator_is_scaled_to_the_circle_first() -> None:
    operator = torch.tensor(operators()["Gaussian, rho about 1"])
    scaled = operator / torch.linalg.eigvals(operator).abs().max()
    for factor in (1.0, 7.0, 1e6):
        assert kreiss_constant(factor * scaled).item() == pytest.approx(kreiss_constant(scaled).item(), rel=1e-3)
    assert kreiss_constant(0.5 * scaled).item() < kreiss_constant(scaled).item()


def test_a_batch_and_given_eigenvectors_change_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(2, 3, 12, 12, generator=generator, dtype=torch.float64) / 12**0.5
    together = kreiss_constant(batch)
    given_vectors = kreiss_constant(batch, torch.linalg.eig(batch))
    assert together.shape == (2, 3)
    for index in np.ndindex(2, 3):
        alone = kreiss_constant(batch[index]).item()
        assert together[index].item() == pytest.approx(alone, rel=KREISS_ACCURACY)
        assert given_vectors[index].item() == pytest.approx(alone, rel=KREISS_ACCURACY)


def test_memory_bounds_a_batch_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    batch = torch.randn(5, 6, 6, generator=generator, dtype=torch.float64) / 6**0.5
    together = kreiss_constant(batch)
    sizes: list[int] = []
    kreiss = nonnormality._kreiss

    def counted(matrices: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.append(len(matrices))
        return kreiss(matrices, *rest)

    monkeypatch.setattr(nonnormality, "_kreiss", counted)
    monkeypatch.setattr(nonnormality, "_BATCH_ELEMENTS", 2 * 6 * 16 * 6)
    assert kreiss_constant(batch).numpy() == pytest.approx(together.numpy(), rel=KREISS_ACCURACY)
    assert sizes == [2, 2, 1]
    sizes.clear()
    monkeypatch.setattr(nonnormality, "_BATCH_ELEMENTS", 1)
    assert kreiss_constant(batch[0]).item() == pytest.approx(together[0].item(), rel=KREISS_ACCURACY)
    assert sizes == [1]


@given(seed=st.integers(0, 2**31), size=st.integers(1, 9), scale=st.floats(0.0, 3.0))
def test_never_below_one_never_above_the_bounds_of_theory(seed: int, size: int, scale: float) -> None:
    """1 <= K <= kappa(V), and K bounds the powers: sup ||B^k|| <= e R K (Kreiss matrix theorem)."""
    generator = torch.Generator().manual_seed(seed)
    operator = scale * torch.randn(size, size, generator=generator, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eig(operator)
    constant = kreiss_constant(operator).item()
    assert 1.0 <= constant <= condition_number(real_eigenvectors(eigenvalues, vectors)).item() * (1 + 1e-6)
    scaled = operator / max(1.0, eigenvalues.abs().max().item())
    power, largest = scaled, 1.0
    for _ in range(60):
        largest = max(largest, torch.linalg.matrix_norm(power, 2).item())
        power = power @ scaled
    assert largest <= math.e * size * constant * (1 + KREISS_ACCURACY)


@given(seed=st.integers(0, 2**31), size=st.integers(1, 12))
def test_real_eigenvectors_keep_the_condition_number(seed: int, size: int) -> None:
    operator = np.random.default_rng(seed).standard_normal((size, size))
    eigenvalues, vectors = torch.linalg.eig(torch.tensor(operator))
    real = real_eigenvectors(eigenvalues, vectors)
    assert real.dtype == torch.float64
    wanted = np.linalg.cond(scipy.linalg.eig(operator)[1])
    assert condition_number(real).item() == pytest.approx(wanted, rel=1e-6)


def test_the_condition_number_of_a_defective_operator_is_capped() -> None:
    eigenvalues, vectors = torch.linalg.eig(torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64))
    assert condition_number(real_eigenvectors(eigenvalues, vectors)).item() == CONDITION_LIMIT


class Landscape:
    """Stands for a resolvent in a search: (|z| - 1) ||(zI - B)^{-1}|| is `merit(log_gap, angle)` at z.

    The vector that reaches the norm at z is z itself. `asked` keeps the points and their start vectors.
    """

    def __init__(self, merit: Callable[[Tensor, Tensor], Tensor], eigenvalues: Tensor | None = None) -> None:
        self.merit, self.eigenvalues = merit, eigenvalues
        self.vectors = torch.zeros((), dtype=torch.complex128)
        self.asked: list[tuple[Tensor, Tensor]] = []

    def probe(self, points: Tensor) -> Tensor:
        return torch.zeros(len(points), 1, points.shape[1], dtype=torch.complex128)

    def norm(self, points: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append((points, start))
        gap = points.abs() - 1
        return self.merit(gap.log(), points.angle()) / gap, points[:, None, :]

    @property
    def angles(self) -> np.ndarray:
        """The angles of the last points, for each operator."""
        return np.stack([np.unique(row.angle().numpy().round(9)) for row in self.asked[-1][0]])

    @property
    def gaps(self) -> tuple[float, float]:
        """Bounds of |z| - 1 of the last points."""
        gap = self.asked[-1][0].abs() - 1
        return float(gap.min()), float(gap.max())


def points_of(search: Any) -> np.ndarray:
    return torch.polar(1 + search.log_gap.exp(), search.angle).numpy()


def turned(*angles: float, modulus: float = 0.9) -> Tensor:
    """Eigenvalues with the angles; one that is neither 0 nor pi brings its conjugate."""
    both = [sign * each for each in angles for sign in ((1,) if each in (0.0, math.pi) else (1, -1))]
    return torch.polar(torch.full((len(both),), modulus, dtype=torch.float64), torch.tensor(both, dtype=torch.float64))


@pytest.mark.parametrize("by_gap", [-1, 0, 1])
@pytest.mark.parametrize("by_angle", [-1, 0, 1])
def test_a_refinement_moves_each_point_by_one_step_towards_its_maximum(by_gap: int, by_angle: int) -> None:
    """Two operators with two points each. The first point finds the maximum, the second moves along the angle."""
    peak_gap, peak_angle = -2.0 + 0.5 * by_gap, 1.0 + 0.25 * by_angle
    land: Any = Landscape(lambda gap, angle: 1 / (1 + (gap - peak_gap) ** 2 + (angle - peak_angle) ** 2))
    log_gap = torch.tensor([[-2.0, peak_gap]] * 2, dtype=torch.float64)
    angle = torch.tensor([[1.0, peak_angle - 0.5]] * 2, dtype=torch.float64)
    vector = torch.zeros(2, 1, 2, dtype=torch.complex64)
    step = torch.full_like(angle, 0.25)
    before = _Search(value=angle, log_gap=log_gap, angle=angle, vector=vector, gap_step=0.5, angle_step=step)
    after = nonnormality._refine(land, before)
    wanted = np.array([[(peak_gap, peak_angle), (peak_gap, peak_angle - 0.25)]] * 2)
    assert np.stack((after.log_gap.numpy(), after.angle.numpy()), -1) == pytest.approx(wanted)
    assert after.value.numpy() == pytest.approx(np.array([[1.0, 1 / (1 + 0.25**2)]] * 2))
    assert after.vector[:, 0].numpy() == pytest.approx(points_of(after))
    assert (after.gap_step, after.angle_step.unique().item()) == (
        0.5 * nonnormality._SHRINK,
        0.25 * nonnormality._SHRINK,
    )


def test_a_scan_keeps_the_best_level_at_each_angle_and_half_of_the_wider_gap_as_its_step() -> None:
    land: Any = Landscape(lambda gap, angle: 1 / (1 + (gap + angle) ** 2))
    angles = torch.tensor([[0.0, 0.5, 2.0, 3.0], [0.0, 1.0, 1.5, 3.0]], dtype=torch.float64)
    levels = torch.tensor([-3.0, -2.0, -1.0, 0.0], dtype=torch.float64)
    found = nonnormality._crests(land, levels, angles)
    assert found.log_gap.tolist() == [[0.0, -1.0, -2.0, -3.0], [0.0, -1.0, -2.0, -3.0]]
    assert found.value.numpy() == pytest.approx(1 / (1 + (found.log_gap + angles).numpy() ** 2))
    assert found.vector[:, 0].numpy() == pytest.approx(points_of(found))
    assert found.angle_step.tolist() == [[0.25, 0.75, 0.75, 0.5], [0.5, 0.5, 0.75, 0.75]]
    assert found.gap_step == nonnormality._LEVEL_STEP / 2


@pytest.mark.parametrize(("low", "high", "count"), [(1e-3, 1.0, 5), (1.0, 10.0, 3), (1.0, math.exp(2.0), 2)])
def test_levels_are_as_few_as_the_largest_step_allows(low: float, high: float, count: int) -> None:
    levels = nonnormality._levels(low, high, torch.device("cpu"))
    assert levels.numpy() == pytest.approx(np.linspace(math.log(low), math.log(high), count))


def test_the_near_search_takes_every_conjugate_pair_and_one_angle_between_neighbours() -> None:
    angles = nonnormality._angles(torch.stack([turned(0.4, 1.0, math.pi), turned(0.0, 0.4, 2.0)]))
    middle = (1.0 + math.pi) / 2
    wanted = np.array([[0.0, 0.4, 0.7, 1.0, middle, math.pi], [0.0, 0.2, 0.4, 1.2, 2.0, math.pi]])
    assert angles.numpy() == pytest.approx(wanted)


@pytest.mark.parametrize(("size", "count"), [(65, 64), (66, 64), (200, 64)])
def test_the_near_search_thins_the_angles_of_a_large_operator_evenly(size: int, count: int) -> None:
    own = torch.linspace(0.1, 3.0, size, dtype=torch.float64)
    (angles,) = nonnormality._angles(torch.polar(torch.ones_like(own), own)[None])
    assert (len(angles), angles[0], angles[-1]) == (count + 2, 0.0, pytest.approx(math.pi))
    between = (own[1:] + own[:-1]) / 2
    assert (angles[1], angles[-2]) == (between[0], between[-1])
    assert angles[1:-1].diff().max() <= 2 * 2.9 / min(count, size - 2)


@pytest.mark.parametrize("height", [10.0, 0.6])
def test_the_near_search_keeps_a_low_maximum_beside_a_high_one_and_those_at_the_ends(height: float) -> None:
    def merit(gap: Tensor, angle: Tensor) -> Tensor:
        broad = height * (1 - 0.2 * (angle - 1.1) ** 2).clamp_min(0.0)
        ends = 0.5 * torch.exp(-100 * angle**2) + 0.5 * torch.exp(-100 * (angle - math.pi) ** 2)
        return (0.9 * broad * (angle - 1.1).abs().lt(1.0) + ends + 0.3 * torch.exp(-400 * (angle - 2.5) ** 2)) * (
            1 + gap / 9
        )

    land: Any = Landscape(merit, turned(*(0.1 * each for each in range(1, 31)))[None])
    found = nonnormality._scan_near(land)
    assert land.gaps == pytest.approx((nonnormality._CLOSE, nonnormality._FAR))
    angles = found.angle[0].numpy()
    for peak in (0.0, 1.1, 2.5, math.pi):
        assert np.abs(angles - peak).min() < 1e-9
    assert found.log_gap.numpy() == pytest.approx(0.0)


def test_the_close_search_takes_the_angles_of_the_largest_eigenvalues() -> None:
    few = turned(0.5, 1.5)
    land: Any = Landscape(lambda gap, angle: 1 / (1 + (angle - 1.5) ** 2) - 0 * gap, few[None])
    found = nonnormality._scan_close(land)
    assert found.angle.tolist() == [[1.5]]
    assert land.gaps == pytest.approx((nonnormality._NEAREST, nonnormality._CLOSE))
    small, large = turned(0.2, 0.4, modulus=0.3), turned(0.5, 0.6, 0.7, 0.8)
    swapped = turned(0.2, 0.4, 0.5, 0.6), turned(0.7, 0.8, modulus=0.3)
    land = Landscape(lambda gap, angle: 1 + 0 * gap, torch.stack([torch.cat((small, large)), torch.cat(swapped)]))
    nonnormality._scan_close(land)
    assert land.angles == pytest.approx(np.array([[0.5, 0.6, 0.7, 0.8], [0.2, 0.4, 0.5, 0.6]]))


@pytest.mark.parametrize(("factors", "furthest"), [((1.0, 3.0), 30.0), ((3.0, 1.0), 30.0), ((0.2, 0.1), 10.0)])
def test_the_far_search_starts_from_the_leading_direction_of_the_hermitian_part(
    factors: tuple[float, float], furthest: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    matrices = drawn / torch.linalg.matrix_norm(drawn, keepdim=True) * torch.tensor(factors)[:, None, None]
    land: Any = Landscape(lambda gap, angle: 1 / (1 + (angle - 1.5) ** 2) - 0 * gap)
    found = nonnormality._scan_far(land, matrices)
    assert land.gaps == pytest.approx((1.0, furthest))
    assert land.angles == pytest.approx(np.linspace(0, math.pi, nonnormality._NUM_FAR_ANGLES)[None].repeat(2, 0))
    assert found.angle.shape == (2, nonnormality._NUM_FAR)
    (points, start) = land.asked[-1]
    for matrix, row, vectors in zip(matrices, points, start, strict=True):
        for point, vector in zip(row, vectors.T, strict=True):
            part = matrix * torch.exp(-1j * point.angle())
            reached = (vector.conj() @ (part @ vector)).real.item()
            assert reached == pytest.approx(torch.linalg.eigvalsh((part + part.mH) / 2).max().item(), abs=1e-5)


def resolvents_of(*matrices: np.ndarray) -> tuple[Any, Any, Tensor]:
    batch = torch.tensor(np.stack(matrices))
    return *nonnormality._resolvents(batch, *torch.linalg.eig(batch)), batch


def test_a_defective_operator_is_perturbed_below_the_accuracy_and_the_others_are_not() -> None:
    jordan = 0.9 * np.eye(3) + 100.0 * np.eye(3, k=1)
    fine, rough, batch = resolvents_of(np.diag([0.5, 0.2, 0.1]), jordan)
    assert rough.vectors.dtype == torch.complex128
    moved = fine.vectors @ torch.diag_embed(fine.eigenvalues) @ fine.inverse - batch
    sizes = torch.linalg.matrix_norm(moved) / torch.linalg.matrix_norm(batch)
    assert sizes[0] < 1e-14
    assert sizes[1] < 1e-8
    assert torch.dist(fine.vectors @ fine.inverse, torch.eye(3)) < 1e-6
    assert (fine.eigenvalues[1] - 0.9).abs().min() > 1e-5


def test_the_rough_search_has_single_precision_where_every_operator_of_the_batch_allows_it() -> None:
    normal, skewed = np.diag([0.5, 0.2]), np.array([[0.5, 1e5], [0.0, 0.2]])
    assert resolvents_of(normal, normal)[1].vectors.dtype == torch.complex64
    assert resolvents_of(normal, skewed)[1].vectors.dtype == torch.complex128


def test_masses_count_the_bands_of_the_paper() -> None:
    moduli = np.array([0.5, 0.79, 0.81, 0.89, 0.91, 1.0, 1.04, 1.06, 2.0, 0.1])
    rng = np.random.default_rng(9)
    x = rng.standard_normal((80, 10))
    layer = profile_transition(torch.tensor(x), torch.tensor(x * moduli))
    assert (layer.near_unit_mass, layer.expansive_mass, layer.contractive_mass) == pytest.approx((0.3, 0.2, 0.3))
    assert layer.spectral_radius == pytest.approx(2.0)


@pytest.mark.parametrize("field", ["eigenvector_condition_number", "kreiss_constant"])
def test_a_normal_operator_has_the_value_one(field: str) -> None:
    """A whitened rotation of isotropic samples is orthogonal up to the error of the sample covariance."""
    rng = np.random.default_rng(10)
    x = np.linalg.qr(rng.standard_normal((200, 10)) - rng.standard_normal((200, 10)).mean(0))[0]
    x -= x.mean(0)
    x = np.linalg.qr(x)[0] * 10.0
    turn = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    layer = profile_transition(torch.tensor(x), torch.tensor(x @ turn.T))
    assert getattr(layer, field) == pytest.approx(1.0, abs=1e-6)


def test_kreiss_of_full_rank_is_on_request_above_256_directions() -> None:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(320, 260, generator=generator, dtype=torch.float64)
    y = x + 0.3 * torch.randn(320, 260, generator=generator, dtype=torch.float64)
    assert profile_states([x, y]).layers[0].kreiss_constant is None
    assert profile_states([x, y], svd_rank=8).layers[0].kreiss_constant is not None
    assert profile_states([x, y], svd_rank=8, kreiss="never").layers[0].kreiss_constant is None
    constant = profile_states([x, y], kreiss="always").layers[0].kreiss_constant
    assert constant is not None
    assert constant >= 1.0


REFUSAL = """
import torch
from koopmon.spectral import kreiss_constant
for bad in (float("nan"), float("inf")):
    for dtype in (torch.float32, torch.float64):
        try:
            kreiss_constant(torch.full((4, 4), bad, dtype=dtype))
        except ValueError as error:
            assert str(error).startswith("operator holds NaN or infinite"), error
        else:
            raise SystemExit("not refused")
"""


@pytest.mark.process
def test_a_non_finite_operator_is_refused_and_does_not_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSAL], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite_is_refused(value: float) -> None:
    operator = torch.eye(3)
    operator[1, 2] = value
    with pytest.raises(ValueError, match="operator holds NaN or infinite values"):
        kreiss_constant(operator)
