"""The KSS action: limits, refusals, and its status. test_injection.py tests the gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec import ValidationError
from msgspec.structs import asdict, replace

from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.action import NextForwards, Target, Update
from koopmon.agent.control.kss.action import KssAction, kss_refusal
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.state import ActionState, ControlState, Ramp
from koopmon.agent.parallelism import ParallelLayout
from koopmon.agent.stats import AgentStats
from koopmon.config import Config, from_mapping
from koopmon.plugins import select
from koopmon.wire.messages import Applied, KssSettings
from tests.adapters.family_zoo import mixtral
from tests.agent.models import build

LAYOUT = ParallelLayout("ddp", True)


def action(config: Config | None = None) -> KssAction:
    return KssAction(config or Config(), AgentStats(), CircuitBreaker("a test"))


def in_force(settings: KssSettings, num_steps: int = 0) -> ControlState:
    parameters = asdict(settings)
    ramp = Ramp(first_step=0, start=0.0, target=parameters.pop("alpha"), num_steps=num_steps)
    return ControlState(actions={"set_kss": ActionState(ramp=ramp, parameters=parameters)})


def test_each_cap_is_applied_and_named() -> None:
    limits = {"max_kss_alpha": 2.0, "max_kss_svd_rank": 8, "max_kss_samples": 64}
    capped = action(from_mapping({"limits": limits}))
    asked = KssSettings(alpha=5.0, svd_rank=16, num_samples=256, tau_u=1.7)
    target = capped.target(Applied(kss=asked), ControlState(), 0)
    expected = asdict(replace(asked, svd_rank=8, num_samples=64))
    expected.pop("alpha")
    detail = "alpha capped at 2.0, svd_rank capped at 8, num_samples capped at 64"
    assert target == Target(2.0, expected, detail)
    within = KssSettings(alpha=2.0, svd_rank=8, num_samples=64)
    assert capped.target(Applied(kss=within), ControlState(), 0).detail == ""
    assert not capped.target(Applied(kss=KssSettings(alpha=0.0)), ControlState(), 0).acts


def test_the_value_in_force_has_the_ramped_alpha_and_the_other_settings_at_once() -> None:
    settings = KssSettings(alpha=0.8, tau_u=1.7, svd_rank=9)
    state = in_force(settings, num_steps=4)
    assert action().applied(ControlState(), 5) == {"kss": KssSettings()}
    for step, alpha in zip((0, 1, 3, 9), (0.2, 0.4, 0.8, 0.8), strict=True):
        assert action().applied(state, step)["kss"].alpha == pytest.approx(alpha)
        assert action().training(state, step) == {"kss_alpha": pytest.approx(alpha)}
    assert replace(action().applied(state, 0)["kss"], alpha=0.8) == settings


@pytest.mark.parametrize("wrong", [{"svd_rank": 0}, {"svd_rank": 1.5}, {"tau_u": -1.0}, {"unknown": 1.0}])
def test_numbers_of_rank_0_are_held_to_the_bounds_of_the_protocol(wrong: dict[str, float]) -> None:
    ramp = Ramp(first_step=0, start=0.0, target=0.5)
    state = ControlState(actions={"set_kss": ActionState(ramp=ramp, parameters=wrong)})
    with pytest.raises(ValidationError):
        action().applied(state, 5)


def test_it_is_refused_where_ranks_split_tokens_and_where_modules_are_shielded() -> None:
    torch.manual_seed(0)
    model = mixtral()[0]
    refused, allowed = action(), action(from_mapping({"kss": {"through_shielded": True}}))
    for each in (refused, allowed):
        assert each.capability(LAYOUT).acts, "nothing is known against it yet"
        each.inspect(model, OptimizerSet(), select(model))
    assert not refused.capability(LAYOUT).acts
    assert "model.layers.0.mlp.gate and 3 more" in refused.capability(LAYOUT).reason
    assert allowed.capability(LAYOUT).acts
    split = ParallelLayout("tp", True, splits_tokens=True)
    assert not allowed.capability(split).acts
    assert "different tokens" in allowed.capability(split).reason
    device = ParallelLayout("single", True, device="cuda")
    assert allowed.capability(device).reason == "KSS is refused: it is not proven on cuda"
    assert action(from_mapping({"limits": {"act": "always"}})).capability(device).acts
    plain = build()
    refused.inspect(plain, OptimizerSet(), select(plain))
    assert refused.capability(LAYOUT).acts, "another adapter took over, and shields nothing"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [({}, None), ({"tau_u": 1.5}, KssSettings(alpha=0.15, tau_u=1.5)), ({"tau_u": -1.0}, None)],
)
def test_hello_has_the_adapters_settings_if_they_are_valid(
    overrides: dict[str, float], expected: KssSettings | None, caplog: pytest.LogCaptureFixture
) -> None:
    adapter: Any = SimpleNamespace(name="other", kss_settings=lambda: overrides)
    assert action().hello(adapter) == {"kss": expected}
    assert ("are left out" in caplog.text) == (overrides.get("tau_u") == -1.0)


def test_it_injects_only_while_alpha_is_above_zero() -> None:
    kss, forwards = action(), NextForwards(num_layers=3, num_microbatches=1, data_rank=0)
    assert kss.before_forwards(ControlState(), 5, forwards) is None
    state = in_force(KssSettings(alpha=0.5))
    injection: Any = kss.before_forwards(state, 5, forwards)
    assert injection.active
    kss.revert()
    assert not injection.active
    assert kss.before_forwards(state, 5, NextForwards(0, 1, 0)) is None, "no chain is verified yet"


def test_it_is_refused_while_one_block_is_several_layers() -> None:
    kss = action()
    for obstacle in ("one block is several layers", ""):
        kss.before_forwards(ControlState(), 5, NextForwards(3, 1, 0, obstacle=obstacle))
        assert kss.capability(LAYOUT).acts is (obstacle == "")


def test_it_ends_once_nothing_can_change_the_stream(caplog: pytest.LogCaptureFixture) -> None:
    kss, state = action(), in_force(KssSettings(alpha=0.5, tau_u=1.7))
    assert kss.tuned(state) is state
    kss.before_forwards(state, 5, NextForwards(3, 1, 0, obstacle="the blocks run inside a compiled graph"))
    ended = kss.tuned(state)
    assert ended.version == state.version + 1
    assert kss.applied(ended, 6)["kss"] == KssSettings(alpha=0.0, tau_u=1.7)
    assert kss.tuned(ended) is ended
    assert kss.tuned(ControlState()) == ControlState()
    assert caplog.messages == ["koopmon: KSS is no longer in force: the blocks run inside a compiled graph"]


def test_the_scaler_is_looked_for_before_the_first_step_with_kss(monkeypatch: pytest.MonkeyPatch) -> None:
    kss, found = action(), []
    monkeypatch.setattr(kss._injection, "find_scaler", found.append)
    optimizer: Any = object()
    ramp = Ramp(first_step=5, start=0.0, target=0.5, num_steps=1)
    state = ControlState(actions={"set_kss": ActionState(ramp=ramp)})
    for step in range(3, 6):
        kss.apply(state, step, Update(optimizer, (), {}))
        assert len(found) == max(0, step - 3)
    assert set(found) == {optimizer}


def test_layers_without_a_usable_gradient_are_counted() -> None:
    kss = action()
    assert kss.facts() == {"kss_skipped": 0.0}
    kss._injection.skipped.put(3.0)
    assert kss.facts() == {"kss_skipped": 3.0}


@pytest.mark.parametrize(("number", "named"), [(0, ""), (1, "head"), (2, "head and 1 more"), (3, "head and 2 more")])
def test_a_refusal_names_a_shielded_module_and_counts_the_others(
    number: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    modules = [model.head, model.embedding, model.blocks][:number]
    monkeypatch.setattr("koopmon.agent.control.kss.action.shielded", lambda *_: modules)
    advice = ": set [kss] through_shielded = true to allow it"
    text = f"KSS would reach what the model's family shields from it, {named}{advice}"
    assert kss_refusal(model, select(model)) == (text if number else "")


def test_a_shielded_module_has_a_name_of_bounded_length_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = torch.nn.Sequential(), torch.nn.Linear(1, 1)
    model.add_module("x" * 201, other)
    for module, name in ((other, "x" * 200), (torch.nn.Linear(1, 1), "a module of the model")):
        monkeypatch.setattr("koopmon.agent.control.kss.action.shielded", lambda *_, module=module: [module])
        assert f"shields from it, {name}: set" in kss_refusal(model, select(build()))
