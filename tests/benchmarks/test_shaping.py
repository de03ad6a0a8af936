"""Forms of shaping match their descriptions, and the guard inside a training decides like the product."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("scipy")

import numpy as np
import torch
from torch import nn

from benchmarks.control import DELAY, Controller
from benchmarks.kss import BASE, LOOK_RATES, QUOTED, SETTINGS, base_of, cells, main, summarise
from benchmarks.models import Decoder
from benchmarks.shaping import Form, Shaping
from benchmarks.training import Recipe, train
from koopmon.spectral import SpectralProfile, profile_states

torch.set_num_threads(1)
SMALL = Recipe(task="recall-2", width=32, num_layers=2, lr=0.003, seed=0, steps=6, warmup=2, profile_every=0)


def shaped(form: Form, *, alpha: float = 0.5, tau_u: float = 1.01, gain: float = 6.0) -> tuple[Decoder, Shaping]:
    """Build a small model with large updates, after one watched forward pass."""
    torch.manual_seed(0)
    model = Decoder("none", width=32, num_layers=2, max_tokens=16, vocabulary=32)
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(gain)
    shaping = Shaping(model, form, alpha=alpha, every=1, svd_rank=8, fraction=1.0)
    shaping.tau_u = tau_u
    with shaping.watching(0):
        model(torch.randint(32, (16, 16)))
    return model, shaping


def states_of(model: Decoder) -> list[torch.Tensor]:
    torch.manual_seed(1)
    h = model.token(torch.randint(32, (16, 16))) + model.position.weight[:16]
    states = [h]
    for block in model.blocks:
        states.append(block(states[-1]))
    return [state.flatten(0, 1).detach() for state in states]


def radius(model: Decoder) -> float:
    return profile_states(states_of(model), svd_rank=8, kreiss="never").max("spectral_radius")


def test_without_a_form_training_is_untouched() -> None:
    plain, off = train(SMALL)[1]["loss"], train(replace(SMALL, shaping="unstable", alpha=0.0))[1]["loss"]
    assert plain.tolist() == off.tolist()


@pytest.mark.parametrize("form", ["published", "unstable", "target", "decoupled", "branch"])
def test_every_form_changes_a_training_and_lets_it_live(form: Form) -> None:
    recipe = replace(SMALL, shaping=form, alpha=0.3, tau_u=0.5)
    scalars, series = train(recipe)
    assert scalars["died_at"] is None
    assert series["loss"][0] == train(SMALL)[1]["loss"][0]
    assert not np.array_equal(series["loss"], train(SMALL)[1]["loss"])


def test_the_decoupled_step_is_the_stated_share_of_the_optimizers() -> None:
    model, shaping = shaped("decoupled", alpha=0.25)
    penalty = shaping.penalty()
    assert penalty is not None
    assert penalty.item() > 0
    shaping.before_step(penalty)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    step = 0.01 * torch.randn_like(before)
    nn.utils.vector_to_parameters(before + step, model.parameters())
    shaping.after_step()
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (after - before - step).norm().item() == pytest.approx(0.25 * step.norm().item(), rel=1e-3)


@pytest.mark.parametrize("form", ["decoupled", "branch"])
def test_a_step_outside_the_optimizer_lowers_the_radius(form: Form) -> None:
    model, shaping = shaped(form, alpha=0.2)
    before = radius(model)
    shaping.before_step(shaping.penalty())
    if form == "decoupled":  # the length of the optimizer's step, absent here
        shaping._before = [p.detach() + 0.05 * torch.randn_like(p) for p in shaping._parameters]
    shaping.after_step()
    assert radius(model) < before


def test_branch_leaves_a_calm_layer_alone() -> None:
    model, shaping = shaped("branch", tau_u=100.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    shaping.before_step(shaping.penalty())
    shaping.after_step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_controller_acts_as_late_as_the_wire_does() -> None:
    controller = Controller("lr")
    for step in range(12):
        controller.begin(step)
        if controller.lr_scale < 1.0:
            break
        controller.see(step, None if step in (4, 5) else _calm(), 2.0, 0.01)
    assert step == 5 + DELAY
    assert controller.num_actions == 1
    assert controller.min_lr_scale == 0.25, "states that are not finite are severe"


def test_a_loss_spike_halves_the_rate_and_calm_restores_it() -> None:
    controller = Controller("spike")
    scales = []
    for step in range(80):
        controller.begin(step)
        controller.see(step, _calm(), 9.0 if step == 10 else 2.0, 0.01)
        scales.append(controller.lr_scale)
    assert scales[9] == 1.0
    assert set(scales[10:60]) == {0.5}
    assert scales[60] == 1.0


def _calm() -> SpectralProfile:
    generator = torch.Generator().manual_seed(0)
    return profile_states(torch.cumsum(torch.randn((3, 64, 8), generator=generator), dim=0), svd_rank=4, kreiss="never")


def test_cells_share_their_seeds_and_sum_up_what_became_of_them() -> None:
    wanted = cells({"nothing": [0.002, 0.1], "clipping at 1.0": [0.1, 0.002]}, range(3), 5)
    assert len(wanted) == 12
    assert {recipe.seed for _, recipe in wanted} == {0, 1, 2}
    assert all(recipe.steps == 5 for _, recipe in wanted)
    from benchmarks.campaign import Kept

    lived = {"died_at": None, "accuracy": 0.5, "final_loss": 1.0, "num_actions": 2, "seconds_per_step": 0.1}
    died = {"died_at": 3, "accuracy": None, "final_loss": None, "num_actions": 0, "seconds_per_step": 0.3}
    cell = summarise("nothing", 0.1, [Kept(BASE, lived, {}), Kept(BASE, died, {})], "abc")
    assert (cell.diverged, cell.accuracy, cell.actions, cell.seconds_per_step) == (0.5, 0.5, 1.0, 0.2)
    assert cell.low < 0.5 < cell.high
    assert all(replace(BASE, **setting) for setting in SETTINGS.values())
    assert {base_of(name) for name in SETTINGS} == set(LOOK_RATES)


@pytest.mark.slow
@pytest.mark.process
def test_cells_that_are_known_are_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "kss.json"
    arguments = ["--out", str(out), "--steps", "3", "--seeds", "1", "--workers", "1", "--look", "--quote", "nothing"]
    assert main(arguments) == 0
    document = json.loads(out.read_text())
    assert [cell["step_ratio"] for cell in document["cells"]] == [1.0] * len(QUOTED["nothing"])
    document["cells"][0]["accuracy"] = 0.875
    out.write_text(json.dumps(document))
    assert main(arguments) == 0
    assert json.loads(out.read_text())["cells"][0]["accuracy"] == 0.875
    assert main([*arguments, "--again", "cells"]) == 0
    assert json.loads(out.read_text())["cells"][0]["accuracy"] != 0.875


def test_a_projected_branch_meets_the_modulus_and_a_late_one_waits() -> None:
    model, shaping = shaped("projected", alpha=0.9, tau_u=1.1)
    assert shaping.factor(1.1) == 1.0
    assert shaping.factor(1.2) == pytest.approx(0.5)
    assert shaping.factor(1e9) == pytest.approx(0.1)
    before = radius(model)
    shaping.after_step()
    assert 1.0 < radius(model) < before
    model, shaping = shaped("branch")
    shaping._delay = 1
    before = radius(model)
    shaping.after_step()
    assert radius(model) == before
    with shaping.watching(1):
        model(torch.randint(32, (16, 16)))
    shaping.after_step()
    assert radius(model) < before
