"""Ceilings in the training's process: the policy sets them, they hold the writing weights, and they end when calm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.ceilings import Ceilings, writing_weights
from benchmarks.control import DELAY, Controller
from benchmarks.proving_ground.models import build
from benchmarks.proving_ground.training import Recipe, blocks_of, train
from koopmon.config import KssConfig
from koopmon.spectral import SpectralProfile, profile_states

STATES = torch.cumsum(torch.randn((3, 64, 8), generator=torch.Generator().manual_seed(0)), dim=0)
PROFILE = profile_states(list(STATES), svd_rank=4, kreiss="never")


def profile(*radii: float, update_ratio: float | None = None) -> SpectralProfile:
    layers = [replace(layer, spectral_radius=radius) for layer, radius in zip(PROFILE.layers, radii, strict=True)]
    if update_ratio is not None:
        layers = [replace(layer, update_ratio=update_ratio) for layer in layers]
    return replace(PROFILE, layers=tuple(layers))


def blocks() -> list[nn.Module]:
    return blocks_of(build("pre", width=16, num_layers=2, max_tokens=8, seed=0))


def norms(block: nn.Module) -> list[float]:
    return [float(weight.detach().norm()) for weight in writing_weights(block)]


def grow(block: nn.Module) -> None:
    with torch.no_grad():
        writing_weights(block)[0].mul_(1.1)


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


def test_a_ceiling_holds_after_each_update_until_it_ends() -> None:
    both = blocks()
    before = [norms(block) for block in both]
    ceilings = Ceilings(both)
    ceilings.set({0: 0.5})
    for _ in range(2):
        ceilings.hold()
        assert norms(both[0]) == pytest.approx([norm / 2 for norm in before[0]])
        grow(both[0])
    assert norms(both[1]) == before[1]
    ceilings.set({})
    grown = norms(both[0])
    ceilings.hold()
    assert (norms(both[0]), ceilings.num_held) == (grown, 2)


@pytest.mark.parametrize("control", ["kss", "kss+lr"])
def test_an_alarm_of_the_policy_sets_ceilings_which_end_when_the_run_is_calm(control: str) -> None:
    """The states of an alarm are not finite here, or have update ratios that jump."""
    both = blocks()
    before = norms(both[0])
    controller = Controller(control, num_layers=2, exponent=0.0, ceilings=Ceilings(both))  # type: ignore[arg-type]
    held = []
    for step in range(80 + KssConfig().calm_steps):
        wild = 20 <= step < 26
        controller.begin(step, 0.01)
        seen = profile(30.0, 1.0, update_ratio=10.0 ** (step % 5)) if wild else profile(1.5, 1.0, update_ratio=0.1)
        controller.see(step, seen, 3.0, 0.01)
        grow(both[0])
        controller.after_update()
        held.append(controller.held_steps)
    first = next(step for step, count in enumerate(held) if count)
    assert 20 + DELAY <= first <= 26 + DELAY
    assert held[-1] == held[-2] < 60 + KssConfig().calm_steps
    assert norms(both[0])[0] > 1e3 * before[0]


def test_a_calm_run_is_that_of_clipping_alone() -> None:
    recipe = Recipe(family="pre", width=16, num_layers=2, lr=1e-4, seed=0, steps=12, warmup=4, batch=2, num_tokens=16)
    alone, _ = train(recipe)
    for arm in ("projection", "projection_lr"):
        watched, _ = train(replace(recipe, arm=arm))
        assert (watched["final_loss"], watched["held_steps"]) == (alone["final_loss"], 0)
