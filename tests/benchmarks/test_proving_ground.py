"""Proving ground: models, schedule, clipping rules, and results from recorded runs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.campaign import Kept
from benchmarks.proving_ground import text
from benchmarks.proving_ground.__main__ import LARGE, SMALL, analyse, kept_models, plan
from benchmarks.proving_ground.clipping import AdaGC, ZClip, gradient_rule
from benchmarks.proving_ground.models import NORMS, LanguageModel, largest_logit, rotate
from benchmarks.proving_ground.outcomes import (
    best_rate,
    false_alarms,
    fault,
    final_loss,
    interval,
    outcome,
    sensitivity,
    shown_at,
    spiked,
)
from benchmarks.proving_ground.training import FAILURES, Launch, Recipe, is_due, train


def kept(loss: float | None = 2.0, **fields: Any) -> Kept[Recipe]:
    series = fields.pop("series", {"loss": np.full(100, 2.0)})
    scalars = {"diverged_at": None, "first_loss": 5.5, "final_loss": loss, "num_actions": 0, "first_action": None}
    scalars |= {name: fields.pop(name) for name in tuple(fields) if name in scalars}
    recipe = Recipe(**{"family": "pre", "lr": 0.003, "seed": 0, "steps": 100, "warmup": 10} | fields)
    return Kept(recipe, scalars, series)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_model_is_causal(norm: Any, qk_norm: bool) -> None:
    torch.manual_seed(0)
    model = LanguageModel(norm, width=16, num_layers=2, max_tokens=8, qk_norm=qk_norm)
    tokens = torch.randint(256, (2, 8))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:5].max() == 0.0
    assert difference[5:].min() > 0.0


def test_rotary_logits_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    turned_q, turned_k = rotate(q.expand(1, 1, 12, 16)), rotate(k.expand(1, 1, 12, 16))
    logits = (turned_q @ turned_k.transpose(-1, -2))[0, 0]
    for distance in range(-5, 6):
        diagonal = logits.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal))
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(1, 1, 12))


def test_the_largest_logit_leaves_the_future_out() -> None:
    q, k = torch.randn(3, 4, 6, 8), torch.randn(3, 4, 6, 8)
    k[..., 5, :] *= 1e3
    pairs = [(t, s) for t in range(6) for s in range(t + 1)]
    allowed = torch.stack([(q[:, :, t] * k[:, :, s]).sum(-1) for t, s in pairs])
    expected = allowed.amax(dim=(0, 1)) / math.sqrt(8)
    assert torch.allclose(largest_logit(q, k), expected)


def test_excerpts_for_validation_are_held_out() -> None:
    border = int(len(text.library_source()) * text.TRAINING_SHARE)
    whole = bytes(text.library_source()[border - 40 :].tolist())
    excerpt = text.batch(torch.Generator().manual_seed(0), 4, 16, validation=True)
    assert excerpt.shape == (4, 17)
    assert all(bytes(row.tolist()) in whole for row in excerpt)


def test_the_schedule_warms_up_decays_and_restarts() -> None:
    recipe = Recipe(family="pre", lr=0.01, seed=0, steps=200, warmup=20)
    rates = [recipe.scheduled_rate(step) for step in range(200)]
    assert rates[0] == pytest.approx(0.01 / 20, rel=1e-3)
    assert max(rates) == pytest.approx(0.01, rel=0.05)
    assert rates[-1] == pytest.approx(0.001, rel=0.01)
    restarted = replace(recipe, failure="restart")
    assert restarted.scheduled_rate(99) == rates[99]
    assert restarted.scheduled_rate(100) == pytest.approx(30 * rates[100])
    assert replace(recipe, failure="no_warmup").scheduled_rate(0) == 0.01
    tuned = replace(recipe, failure="finetune")
    assert tuned.scheduled_rate(99) == rates[99]
    assert tuned.scheduled_rate(100) == pytest.approx(3 * rates[100])
    assert tuned.scheduled_rate(109) == pytest.approx(30 * rates[109])


def test_snapshots_are_dense_at_the_start_and_where_they_are_asked_for() -> None:
    assert all(is_due(step, 0) for step in range(200))
    assert [step for step in range(200, 240) if is_due(step, 0)] == [200, 210, 220, 230]
    assert all(is_due(step, 240) for step in range(200, 240))


def gradients(*norms: float) -> tuple[list[nn.Parameter], torch.Tensor]:
    parameters = [nn.Parameter(torch.zeros(4)) for _ in norms]
    for parameter, norm in zip(parameters, norms, strict=True):
        parameter.grad = torch.tensor([norm, 0.0, 0.0, 0.0])
    return parameters, nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@pytest.mark.parametrize("arm", ["clip", "zclip", "adagc"])
def test_every_arm_clips_at_one(arm: str) -> None:
    rule = gradient_rule(arm, 1.0)
    for _ in range(60):
        parameters, norm = gradients(3.0, 4.0)
        rule(parameters, norm)
        assert nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]) <= 1.0 + 1e-5


def test_zclip_holds_an_outlier_and_lets_the_usual_pass() -> None:
    rule = ZClip()
    for index in range(40):
        rule(*gradients(0.5 + 0.01 * (index % 3)))
    parameters, norm = gradients(0.51)
    assert rule(parameters, norm) == norm
    parameters, norm = gradients(50.0)
    assert rule(parameters, norm) < 0.6
    assert parameters[0].grad is not None
    assert parameters[0].grad.norm() < 0.6


def test_adagc_holds_each_tensor_to_its_own_norm() -> None:
    rule = AdaGC()
    for _ in range(60):
        rule(*gradients(0.1, 0.5))
    parameters, norm = gradients(1.0, 0.5)
    rule(parameters, norm)
    held = [p.grad.norm().item() for p in parameters if p.grad is not None]
    assert held[0] == pytest.approx(0.105, rel=0.01)
    assert held[1] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"loss": 2.05}, "healthy"),
        ({"loss": 2.15}, "ruined"),
        ({"loss": None, "diverged_at": 40}, "diverged"),
        ({"series": {"loss": np.array([2.0] * 60 + [4.0] + [2.0] * 39)}}, "spiked"),
        ({"series": {"loss": np.array([2.0] * 5 + [4.0] + [2.0] * 94)}}, "healthy"),
    ],
    ids=["healthy", "ruined", "diverged", "spiked", "a spike in the warm-up"],
)
def test_outcomes(fields: dict[str, Any], expected: str) -> None:
    assert outcome(kept(**fields), 2.0) == expected


def test_sensitivity_is_the_mean_excess_over_rates_capped_by_the_first_loss() -> None:
    runs = [kept(loss, lr=lr, seed=seed) for seed in (0, 1) for lr, loss in ((1e-3, 2.0), (1e-2, 3.0), (1e-1, 9.0))]
    found = sensitivity(runs, 2.0)
    assert found.mean == pytest.approx((0.0 + 1.0 + 3.5) / 3)
    assert found.low == found.high == pytest.approx(found.mean), "both seeds ended alike"
    assert best_rate(runs) == (1e-3, 2.0)
    assert final_loss(kept(None, diverged_at=3)) == 5.5


def test_an_interval_holds_its_mean() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0])
    assert found.low < found.mean == 2.5 < found.high
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_a_loss_that_stays_above_the_healthy_one_shows_the_damage() -> None:
    healthy = kept(series={"loss": np.full(100, 2.0)})
    ruined = kept(series={"loss": np.array([2.0] * 50 + [2.5] * 50)})
    back = kept(series={"loss": np.array([2.0] * 50 + [2.5] * 20 + [2.0] * 30)})
    shown = shown_at(ruined, healthy)
    assert shown is not None
    assert 50 < shown < 60
    assert shown_at(back, healthy) is None
    assert shown_at(kept(None, diverged_at=70, series={"loss": np.full(71, 2.0)}), healthy) == 70


def test_false_alarms_are_counted_by_run_and_by_step() -> None:
    found = false_alarms([kept(), kept(num_actions=2), kept(), kept()])
    assert found == {"num_runs": 4, "untouched": 0.75, "actions_per_1000_steps": 5.0}
    assert not spiked(np.full(50, 2.0))


def test_the_plan_has_clipping_alone_for_every_other_run() -> None:
    cases = list(plan((10,), ((64, 4),)))
    assert len(cases) == len(set(cases))
    alone = {replace(case, arm="clip") for case in cases}
    assert alone <= set(cases)


def test_a_guarded_run_that_needs_no_guard_is_the_same_run() -> None:
    recipe = Recipe(family="rms", width=16, num_layers=2, lr=1e-3, seed=3, steps=12, warmup=6, batch=4, num_tokens=16)
    scalars, series = train(recipe)
    guarded, watched = train(replace(recipe, arm="guarded"))
    assert guarded["num_actions"] == 0
    assert guarded["final_loss"] == scalars["final_loss"]
    assert (watched["loss"] == series["loss"]).all()
    assert series["update_ratio"].shape == series["max_logit"].shape == (12, 2)
    assert np.isfinite(series["stream_rms"]).all()


@pytest.mark.parametrize("failure", FAILURES)
def test_a_fault_changes_the_run_from_its_step_on(failure: Any) -> None:
    recipe = Recipe(family="pre", width=16, num_layers=2, lr=1e-2, seed=3, steps=12, warmup=3, batch=4, num_tokens=16)
    _, plain = train(recipe)
    _, faulted = train(replace(recipe, failure=failure))
    same = np.flatnonzero(plain["loss"] != faulted["loss"])
    first = 1 if failure == "no_warmup" else 6 if failure == "bad_batches" else 7
    assert same[0] == first, "the fault reaches the update of step 6, or its batch, and the loss after it"


def test_a_new_launch_has_its_own_agent() -> None:
    recipe = Recipe(family="pre", width=16, num_layers=2, lr=1e-3, seed=3, steps=8, warmup=3, batch=4, num_tokens=16)
    _, series = train(replace(recipe, arm="guarded", failure="lost_state"))
    assert np.isfinite(series["loss"]).all()
    launch = Launch(replace(recipe, arm="guarded"), LanguageModel("pre", width=16, num_layers=2, max_tokens=16), 100)
    launch.controller.first_action = 7
    assert launch.first_action == 107
    assert not launch.optimizer.state


def test_a_fault_is_compared_with_the_same_seed_without_it() -> None:
    unfaulted = [kept(2.0, seed=1), kept(2.2, seed=2)]
    runs = [kept(loss, seed=seed, failure="restart") for seed, loss in ((1, 2.5), (2, 2.22))]
    runs += [
        kept(loss, seed=seed, failure="restart", arm="guarded", num_actions=1) for seed, loss in ((1, 2.02), (2, 2.24))
    ]
    found = fault(runs, unfaulted)
    assert (found["clip"], found["guarded"]) == ([2.5, 2.22], [2.02, 2.24])
    assert (found["alone_within"], found["guarded_within"], found["acted"]) == (1, 1, 2)


def test_the_analysis_names_the_best_rate_and_what_the_guard_did() -> None:
    losses = {3e-4: 2.6, 1e-3: 2.3, 3e-3: 2.2, 1e-2: 2.4, 3e-2: 2.6, 1e-1: 2.8, 3e-1: 3.0}
    runs = [kept(loss, lr=lr, seed=seed) for seed in (1, 2) for lr, loss in losses.items()]
    runs += [
        kept(min(loss, 2.24) if lr > 3e-3 else loss, lr=lr, seed=seed, arm="guarded", num_actions=int(lr > 3e-3))
        for seed in (1, 2)
        for lr, loss in losses.items()
    ]
    (model,) = analyse(runs)
    assert model["best_rate"] == 3e-3
    assert model["healthy"]["untouched"] == 1.0
    assert model["within_0.05"] == model["num_above"] == 8
    assert model["arms"]["guarded"]["sensitivity"]["mean"] < model["arms"]["clip"]["sensitivity"]["mean"]
    assert model["arms"]["clip"]["outcomes"]["0.1"] == ["ruined", "ruined"]


def test_a_run_of_one_size_keeps_the_results_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert kept_models(path, [LARGE]) == []
    models = [{"width": width, "num_layers": num_layers, "family": "pre"} for width, num_layers in (SMALL, LARGE)]
    path.write_text(json.dumps({"models": models}), encoding="utf-8")
    assert kept_models(path, [LARGE]) == models[:1]
    assert kept_models(path, [SMALL, LARGE]) == []


def test_the_recorder_has_the_signals_of_the_agent() -> None:
    recipe = Recipe(family="pre", width=16, num_layers=2, lr=0.003, seed=0, steps=12, warmup=4, batch=2, num_tokens=16)
    _, series = train(recipe)
    steps = series["profile_step"]
    assert len(steps) > 1
    for name in ("update_rms", "log_partition"):
        assert series[name].shape == (len(steps), 1)
    assert np.isnan(series["update_rms"][0, 0]), "before the first step there is no second moment"
    assert np.isfinite(series["update_rms"][1:]).all()
    assert series["log_partition"][0, 0] == pytest.approx(math.log(256), rel=0.05)
