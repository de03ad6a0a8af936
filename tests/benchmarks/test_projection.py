"""Projection: ceilings come with an alarm, hold the writing weights, and end when the run is calm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.control import DELAY
from benchmarks.proving_ground.models import build
from benchmarks.proving_ground.projection import CALM_STEPS, Projection, Tau, writing_weights
from benchmarks.proving_ground.training import Recipe, train
from koopmon.config import PolicyConfig
from koopmon.spectral import SpectralProfile, profile_states

POLICY = PolicyConfig()
STATES = torch.cumsum(torch.randn((3, 64, 8), generator=torch.Generator().manual_seed(0)), dim=0)
PROFILE = profile_states(list(STATES), svd_rank=4, kreiss="never")


def profile(*radii: float) -> SpectralProfile:
    layers = [replace(layer, spectral_radius=radius) for layer, radius in zip(PROFILE.layers, radii, strict=True)]
    return replace(PROFILE, layers=tuple(layers))


def blocks() -> list[nn.Module]:
    model = build("pre", width=16, num_layers=2, max_tokens=8, seed=0)
    return list(model.get_submodule("blocks").children())


def norms(block: nn.Module) -> list[float]:
    return [float(weight.detach().norm()) for weight in writing_weights(block)]


def test_the_writing_weights_are_those_behind_attention_and_mlp() -> None:
    (first, _) = blocks()
    assert [tuple(weight.shape) for weight in writing_weights(first)] == [(16, 16), (16, 64)]
    with pytest.raises(ValueError, match="no module"):
        writing_weights(nn.Linear(2, 2))


def test_the_writing_weights_scale_the_update_alone() -> None:
    block = nn.Sequential()
    block.project = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    before = block.project(x)
    with torch.no_grad():
        for weight in writing_weights(block):
            weight.mul_(0.5)
    assert torch.allclose(block.project(x), 0.5 * before)


def test_an_alarm_sets_ceilings_on_the_blocks_above_tau() -> None:
    both = blocks()
    projection = Projection(both, Tau(ratio=1.0, least=2.0))
    for step in range(5):
        projection.see(step, profile(1.5, 3.0), 0.0, POLICY)
        projection.hold(step)
    before = [norms(block) for block in both]
    projection.see(5, profile(2.5, 3.0), 0.9, POLICY)
    for step in range(5, 5 + DELAY):
        projection.hold(step)
    assert [norms(block) for block in both] == before, "the decision is on its way"
    projection.hold(5 + DELAY)
    assert norms(both[0]) == pytest.approx([norm * 1.0 / 1.5 for norm in before[0]])
    assert norms(both[1]) == before[1], "its radius is that of the calm run"
    with torch.no_grad():
        writing_weights(both[0])[0].mul_(10.0)
    projection.hold(6 + DELAY)
    assert norms(both[0]) == pytest.approx([norm * 1.0 / 1.5 for norm in before[0]]), "the ceiling holds at each step"


def test_a_factor_is_bounded_and_ceilings_end_after_a_calm_time() -> None:
    both = blocks()
    projection = Projection(both)
    before = norms(both[0])
    projection.see(0, profile(100.0, 1.0), 0.9, POLICY)
    projection.hold(DELAY)
    assert norms(both[0]) == pytest.approx([norm / 2 for norm in before])
    for step in range(10, 11 + CALM_STEPS):
        projection.see(step, profile(1.0, 1.0), 0.0, POLICY)
    assert not projection.is_active
    projection.hold(10 + CALM_STEPS + DELAY)
    with torch.no_grad():
        writing_weights(both[0])[0].mul_(10.0)
    grown = norms(both[0])
    projection.hold(11 + CALM_STEPS + DELAY)
    assert norms(both[0]) == grown


def test_a_calm_run_is_that_of_clipping_alone() -> None:
    recipe = Recipe(family="pre", width=16, num_layers=2, lr=1e-4, seed=0, steps=12, warmup=4, batch=2, num_tokens=16)
    alone, _ = train(recipe)
    for arm in ("projection", "capped_projection"):
        watched, _ = train(replace(recipe, arm=arm))
        assert watched["final_loss"] == alone["final_loss"]
        assert (watched["held_steps"], watched["first_alarm"]) == (0, None)
