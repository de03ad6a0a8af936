"""Proving ground: models, schedule, clipping rules, and results from recorded runs."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.campaign import Kept
from benchmarks.proving_ground import text
from benchmarks.proving_ground.__main__ import (
    LARGE,
    SMALL,
    Model,
    Plan,
    analyse,
    fault_cases,
    late_radius,
    merged,
    signed,
)
from benchmarks.proving_ground.clipping import AdaGC, ZClip, gradient_rule
from benchmarks.proving_ground.models import FAMILIES, NORMS, LanguageModel, attentions, build, largest_logit, rotate
from benchmarks.proving_ground.optimizers import OPTIMIZERS, set_rate
from benchmarks.proving_ground.optimizers import build as build_optimizers
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
from benchmarks.proving_ground.training import FAILURES, Launch, Recipe, is_due, risk_config, train
from koopmon.profiling import capture_states


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


ALL = Plan(
    models=[
        model
        for width, num_layers in (SMALL, LARGE)
        for family in FAMILIES
        for optimizer in ("adamw", "muon")
        for decay in (0.0, 0.1)
        if (model := Model(width, num_layers, family, optimizer, decay)).exists
    ],
    seeds=(10,),
)


def test_the_plan_has_clipping_alone_for_every_other_run() -> None:
    cases = ALL.cases()
    assert len(cases) == len(set(cases))
    assert {replace(case, arm="clip") for case in cases} <= set(cases)
    assert {case.family for case in cases} == set(FAMILIES)
    assert {case.failure for case in cases} == {"", *FAILURES}
    assert {(case.optimizer, case.weight_decay) for case in cases if case.family == "rms"} == {
        ("adamw", 0.0),
        ("adamw", 0.1),
        ("muon", 0.0),
        ("muon", 0.1),
    }


def test_a_part_of_the_plan_has_its_references_alone() -> None:
    rules = replace(ALL, models=ALL.models[:1], parts=("rules",), arms=("zclip",)).cases()
    assert {case.arm for case in rules} == {"clip", "zclip", "guarded"}
    assert {case.lr for case in rules if case.arm == "zclip"} == {0.01, 0.03, 0.1}
    faults = replace(ALL, models=ALL.models[:1], parts=("faults",), failures=("stale_shift",)).cases()
    assert {(case.failure, case.arm) for case in faults} == {
        ("", "clip"),
        ("shift", "clip"),
        ("stale_shift", "clip"),
        ("stale_shift", "guarded"),
    }
    assert ("no_warmup", 0.03) in fault_cases(("no_warmup",))


def test_a_guarded_run_that_needs_no_guard_is_the_same_run() -> None:
    recipe = Recipe(family="rms", width=16, num_layers=2, lr=1e-3, seed=3, steps=12, warmup=6, batch=4, num_tokens=16)
    scalars, series = train(replace(recipe, signals=True))
    guarded, watched = train(replace(recipe, arm="guarded"))
    assert guarded["num_actions"] == 0
    assert guarded["final_loss"] == scalars["final_loss"]
    assert (watched["loss"] == series["loss"]).all()
    assert series["update_ratio"].shape == series["max_logit"].shape == (12, 2)
    assert np.isfinite(series["stream_rms"]).all()


@pytest.mark.parametrize("failure", FAILURES)
def test_a_fault_changes_the_run_from_its_step_on(failure: Any) -> None:
    recipe = Recipe(family="pre", width=16, num_layers=2, lr=1e-2, seed=3, steps=12, warmup=3, batch=4, num_tokens=16)
    _, plain = train(replace(recipe, failure="shift") if failure == "stale_shift" else recipe)
    _, faulted = train(replace(recipe, failure=failure))
    changed = np.flatnonzero(plain["loss"][: len(faulted["loss"])] != faulted["loss"])  # it ends at a loss of NaN
    firsts = {
        "no_warmup": 1,
        "bf16": 0,
        "shift": 0,
        "stale_shift": 1,
        "bad_batches": 6,
        "bad_stretch": 6,
        "nan_batch": 6,
    }
    first = firsts.get(failure, 7)
    assert changed[0] == first, "the fault reaches the update of step 6, or its batch, and the loss after it"


def test_bytes_change_in_the_middle_of_a_shift() -> None:
    recipe = Recipe(family="pre", lr=1e-2, seed=3, steps=12, failure="shift")
    generator = torch.Generator().manual_seed(0)
    batches = [recipe.batch_at(step, generator) for step in range(12)]
    constant = [bool((batch == batch[:, :1]).all()) for batch in batches]
    assert constant == [True] * 6 + [False] * 6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_guarded_as_the_agent_would_guard_it(family: Any) -> None:
    if family == "mamba":
        pytest.importorskip("mambapy")
    model = build(family, width=16, num_layers=2, max_tokens=16, seed=1)
    tokens = torch.randint(256, (8, 16), generator=torch.Generator().manual_seed(0))
    captured = capture_states(model, tokens, num_samples=64, seed=0)
    assert captured.known_exponent == 0.0, "its blocks count as normalised"
    assert len(captured.states) == 3
    same = build(family, width=16, num_layers=2, max_tokens=16, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), same.parameters(), strict=True))
    assert risk_config(family).reliability_weight == (0.25 if family == "kan" else 0.0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NORMS])
def test_another_family_trains_beside_the_guard_unchanged(family: Any) -> None:
    if family == "mamba":
        pytest.importorskip("mambapy")
    recipe = Recipe(family=family, width=16, num_layers=2, lr=1e-3, seed=3, steps=6, warmup=3, batch=4, num_tokens=16)
    alone, series = train(recipe)
    guarded, watched = train(replace(recipe, arm="guarded"))
    assert (series["loss"] == watched["loss"]).all()
    assert alone["final_loss"] == guarded["final_loss"]
    assert watched["update_ratio"].shape == (6, 2)


def test_attention_in_bfloat16_rounds_and_is_else_the_same() -> None:
    tokens = torch.randint(256, (2, 8))
    exact, rounded = (
        build("rms", width=16, num_layers=2, max_tokens=8, seed=1, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert attentions(rounded)[0].qkv.weight.dtype == torch.float32
    difference = (exact(tokens) - rounded(tokens)).abs().max()
    assert 0.0 < difference < 0.01


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_has_one_optimizer_and_the_rate_of_its_group(name: Any) -> None:
    if name == "stable_adamw":
        pytest.importorskip("pytorch_optimizer")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim has no Muon")
    model = build("rms", width=16, num_layers=2, max_tokens=16, seed=1)
    optimizers = build_optimizers(name, model, lr=0.1, weight_decay=0.0, beta2=0.95, apart="head")
    held = [weight for each in optimizers for group in each.param_groups for weight in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    set_rate(optimizers, 0.01, 30.0)
    rates = {
        id(weight): group["lr"] for each in optimizers for group in each.param_groups for weight in group["params"]
    }
    for path, weight in model.named_parameters():
        assert rates[id(weight)] == (0.3 if path == "head.weight" else 0.01)
    if name == "muon":
        assert all(weight.dim() == 2 for weight in optimizers[0].param_groups[0]["params"])


def test_the_rate_of_muon_does_not_give_the_length_of_its_steps() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim has no Muon")
    recipe = Recipe(family="rms", width=16, num_layers=2, lr=1e-3, seed=3, arm="guarded", optimizer="muon")
    model = build("rms", width=16, num_layers=2, max_tokens=16, seed=1)
    assert Launch(recipe, model, 0).controller._width == 0
    assert Launch(replace(recipe, optimizer="adamw"), model, 0).controller._width == 16


def test_a_new_launch_has_its_own_agent() -> None:
    recipe = Recipe(family="pre", width=16, num_layers=2, lr=1e-3, seed=3, steps=8, warmup=3, batch=4, num_tokens=16)
    _, series = train(replace(recipe, arm="guarded", failure="lost_state"))
    assert np.isfinite(series["loss"]).all()
    launch = Launch(replace(recipe, arm="guarded"), LanguageModel("pre", width=16, num_layers=2, max_tokens=16), 100)
    launch.controller.first_action = 7
    assert launch.first_action == 107
    assert not launch.optimizers[0].state


def test_a_fault_is_compared_with_the_same_seed_without_it() -> None:
    unfaulted = [kept(2.0, seed=1), kept(2.2, seed=2)]
    runs = [kept(loss, seed=seed, failure="restart") for seed, loss in ((1, 2.5), (2, 2.22))]
    runs += [
        kept(loss, seed=seed, failure="restart", arm="guarded", num_actions=1) for seed, loss in ((1, 2.02), (2, 2.24))
    ]
    found = fault(runs, unfaulted)
    assert (found["clip"], found["guarded"]) == ([2.5, 2.22], [2.02, 2.24])
    assert (found["alone_within"], found["guarded_within"], found["acted"]) == (1, 1, 2)
    assert (found["ruined_alone"], found["ruined_within"]) == (1, 1), "the second seed was not ruined"


def test_an_action_before_the_loss_shows_a_fault_has_a_lead() -> None:
    late = {"loss": np.array([2.0] * 60 + [3.0] * 40)}
    runs = [kept(3.0, failure="restart", series=late), kept(2.0, failure="restart", arm="guarded", first_action=52)]
    found = fault(runs, [kept(2.0)])
    assert found["acted_before_shown"] == 1
    assert 0 < found["median_lead_steps"] < 20
    never = [runs[0], kept(3.0, failure="restart", arm="guarded")]
    assert fault(never, [kept(2.0)])["acted_before_shown"] == 0


def test_the_analysis_names_the_best_rate_and_what_the_guard_did() -> None:
    losses = {3e-4: 2.6, 1e-3: 2.3, 3e-3: 2.2, 1e-2: 2.4, 3e-2: 2.6, 1e-1: 2.8, 3e-1: 3.0}
    runs = [kept(loss, lr=lr, seed=seed) for seed in (1, 2) for lr, loss in losses.items()]
    runs += [
        kept(min(loss, 2.24) if lr > 3e-3 else loss, lr=lr, seed=seed, arm="guarded", num_actions=int(lr > 3e-3))
        for seed in (1, 2)
        for lr, loss in losses.items()
    ]
    (model,) = analyse(runs, Plan(models=[Model(64, 4, "pre")], seeds=(1, 2), parts=("rates",)))
    assert model["best_rate"] == 3e-3
    assert model["healthy"]["untouched"] == 1.0
    assert model["within_0.05"] == model["num_above"] == 8
    assert model["arms"]["guarded"]["sensitivity"]["mean"] < model["arms"]["clip"]["sensitivity"]["mean"]
    assert model["arms"]["clip"]["outcomes"]["0.1"] == ["ruined", "ruined"]


def test_a_call_keeps_what_it_did_not_measure() -> None:
    about = {"provenance": {"commit": "abc"}, "seeds": [1]}
    keys = {"family": "rms", "optimizer": "adamw", "weight_decay": 0.0}
    large = {"width": 128, "num_layers": 6, **keys, "best_rate": 1.0, "faults": {}}
    small = {"width": 64, "num_layers": 4, **keys, "best_rate": 2.0, "faults": {"restart": {"acted": 3}}}
    new = {"width": 64, "num_layers": 4, **keys, "rules": {"best": [2.0]}, "faults": {"bf16": {"acted": 0}}}
    post = {"width": 64, "num_layers": 4, **keys, "family": "post", "arms": {}}
    found = merged([large, small], [signed(new, about), signed(post, about)])
    assert [model["family"] for model in found] == ["rms", "post", "rms"]
    assert found[2] == large
    assert found[1]["seeds"] == [1]
    assert found[0]["best_rate"] == 2.0
    assert found[0]["rules"] == {"best": [2.0], **about}
    assert found[0]["faults"] == {"restart": {"acted": 3}, "bf16": {"acted": 0, "seeds": [1], "commit": "abc"}}
    assert "seeds" not in found[0], "the rates were not measured"


def test_the_recorder_has_the_signals_of_the_agent() -> None:
    recipe = Recipe(family="pre", width=16, num_layers=2, lr=0.003, seed=0, steps=12, warmup=4, batch=2, num_tokens=16)
    _, series = train(replace(recipe, signals=True))
    steps = series["profile_step"]
    assert len(steps) > 1
    for name in ("update_rms", "log_partition"):
        assert series[name].shape == (len(steps), 1)
    assert np.isnan(series["update_rms"][0, 0]), "before the first step there is no second moment"
    assert np.isfinite(series["update_rms"][1:]).all()
    assert series["log_partition"][0, 0] == pytest.approx(math.log(256), rel=0.05)


def test_late_radii_are_those_of_the_second_half() -> None:
    radii = np.array([[9.0, 1.0], [9.0, 1.0], [1.5, 3.0], [4.0, 2.0], [1.0, 2.0]])
    run = kept(steps=100, series={"profile_step": np.array([10, 49, 50, 60, 99]), "spectral_radius": radii})
    assert late_radius(run) == 3.0


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "acts"), [(0.01, False), (0.03, True)])
def test_state_spaces_are_left_alone_at_their_best_rate(rate: float, acts: bool) -> None:
    """They learn most at 0.01. The thresholds of transformers alarm there."""
    scalars, _ = train(Recipe(family="mamba", lr=rate, seed=3, steps=60, batch=8, arm="guarded"))
    assert (scalars["num_actions"] > 0) == acts
