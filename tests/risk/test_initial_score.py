"""Initial score and its degenerate case, on profiles of states with a known spectrum."""

from dataclasses import replace

import pytest
import torch

from koopmon.risk.initial_score import initial_risk
from koopmon.spectral import SpectralProfile, profile_states


def chain(operator: torch.Tensor, depth: int = 3, num_samples: int = 200) -> SpectralProfile:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(num_samples, operator.shape[0], generator=generator, dtype=torch.float64)]
    for _ in range(depth):
        noise = 0.01 * torch.randn(states[-1].shape, generator=generator, dtype=torch.float64)
        states.append(states[-1] @ operator.T + noise)
    return profile_states(states)


def diagonal(values: list[float]) -> torch.Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize(
    ("values", "level"),
    [
        ([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.5, 0.3], "low"),
        ([0.95, 0.96, 0.92, 0.5, 0.6, 0.7, 0.5, 0.3], "moderate"),
        ([0.95, 0.96, 0.92, 0.98, 0.97, 1.01, 0.5, 0.3], "high"),
    ],
)
def test_the_level_follows_the_near_unit_mass(values: list[float], level: str) -> None:
    risk = initial_risk(chain(diagonal(values)))
    assert risk.informative
    assert risk.level == level
    assert risk.score == pytest.approx(sum(0.9 <= v <= 1.05 for v in values) / len(values), abs=1e-6)
    assert (risk.svd_rank, risk.num_samples) == (None, 200)


def test_an_identity_has_the_level_unknown() -> None:
    states = [torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))] * 4
    risk = initial_risk(profile_states(states))
    assert not risk.informative
    assert risk.level == "unknown"
    assert risk.score is None


def with_layers(**fields: float) -> SpectralProfile:
    """Build a profile with these figures in all layers."""
    found = chain(diagonal([0.2, 0.3, 0.4, 0.5]))
    return replace(found, layers=tuple(replace(layer, **fields) for layer in found.layers))


@pytest.mark.parametrize(
    ("mass", "kappa", "level"),
    [
        (0.3, 1.0, "moderate"),
        (0.2999, 1.0, "low"),
        (0.5, 1.0, "moderate"),
        (0.5001, 1.0, "high"),
        (0.1, 1e4, "low"),
        (0.1, 1.0001e4, "high"),
    ],
)
def test_a_figure_at_a_threshold_is_not_beyond_it(mass: float, kappa: float, level: str) -> None:
    assert initial_risk(with_layers(near_unit_mass=mass, eigenvector_condition_number=kappa)).level == level


def test_the_exponent_from_the_structure_goes_before_that_of_the_states() -> None:
    profile = chain(diagonal([0.2, 0.3, 0.4, 0.5]))
    assert initial_risk(profile).update_exponent == profile.update_exponent
    assert initial_risk(profile, known_exponent=0.0).update_exponent == 0.0
