"""Accuracy of 1e-6 for a nearly singular x: its condition number must not enter squared."""

from __future__ import annotations

import pytest

pytest.importorskip("pydmd")
pytest.importorskip("scipy")

import numpy as np
import torch
from pydmd import DMD
from scipy.linalg import block_diag
from scipy.optimize import linear_sum_assignment

from koopmon.spectral import profile_transition

WIDTH, SAMPLES = 24, 200
pytestmark = pytest.mark.filterwarnings("ignore:Input data condition number:UserWarning")


def set_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the largest distance in the best matching of two sets of eigenvalues."""
    assert len(first) == len(second)
    cost = np.abs(np.asarray(first)[:, None] - np.asarray(second)[None, :])
    return float(cost[linear_sum_assignment(cost)].max())


def pydmd_eigenvalues(x: np.ndarray, y: np.ndarray, svd_rank: int = -1) -> np.ndarray:
    """Return PyDMD's eigenvalues of centred data. Rows are samples here; columns are samples in PyDMD."""
    return DMD(svd_rank=svd_rank).fit((x - x.mean(0)).T, (y - y.mean(0)).T).eigs


def rotations(radii: np.ndarray, angles: np.ndarray) -> np.ndarray:
    return block_diag(
        *[r * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for r, a in zip(radii, angles, strict=True)]
    )


def test_eigenvalues_are_accurate_for_an_ill_conditioned_x() -> None:
    """The standard deviations span five orders of magnitude. Their square would lose the accuracy of 1e-6."""
    rng = np.random.default_rng(3)
    frame = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    x = rng.standard_normal((SAMPLES, WIDTH)) @ np.diag(np.geomspace(1e3, 1e-2, WIDTH)) @ frame
    y = x @ rotations(rng.uniform(0.9, 1.1, WIDTH // 2), rng.uniform(0.1, 3.0, WIDTH // 2)).T
    profile = profile_transition(torch.tensor(x), torch.tensor(y))
    assert profile.informative
    assert set_distance(profile.eigenvalues.numpy(), pydmd_eigenvalues(x, y)) < 1e-6


def test_a_trajectory_gives_the_same_accuracy_as_independent_samples() -> None:
    rng = np.random.default_rng(4)
    a = rotations(np.full(6, 0.999), np.linspace(0.3, 2.6, 6))
    orbit = [rng.standard_normal(12)]
    for _ in range(300):
        orbit.append(a @ orbit[-1])
    states = np.array(orbit)
    profile = profile_transition(torch.tensor(states[:-1]), torch.tensor(states[1:]))
    assert set_distance(profile.eigenvalues.numpy(), np.linalg.eigvals(a)) < 1e-6
    assert set_distance(profile.eigenvalues.numpy(), pydmd_eigenvalues(states[:-1], states[1:])) < 1e-6
