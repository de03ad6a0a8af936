"""The hooks on the optimizers of a model: on the members alone, put back where they are gone, and called last."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.hooked_optimizers import HookedOptimizers


class Wrapper(Optimizer):
    """Holds another optimizer, but not yet while its constructor registers it."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(2, 2)


class Calls(list[str]):
    """The names of the hooks in the order of their calls."""

    def before(self, *_: Any) -> None:
        self.append("before")

    def after(self, *_: Any) -> None:
        self.append("after")


def hooked(model: nn.Module, calls: Calls | None = None) -> HookedOptimizers:
    calls = Calls() if calls is None else calls
    return HookedOptimizers(model, OptimizerSet(), calls.before, calls.after)


def test_each_member_has_one_pair_of_hooks_until_they_are_removed(model: nn.Module) -> None:
    calls = Calls()
    found, optimizer = hooked(model, calls), SGD(model.parameters(), lr=0.1)
    assert not found.has_hooks(optimizer)
    found.add(optimizer)
    found.add(optimizer)
    optimizer.step()
    assert calls == ["before", "after"]
    assert found.has_hooks(optimizer)
    for _ in range(2):
        found.remove()
        optimizer.step()
    assert len(calls) == 2
    assert not found.has_hooks(optimizer)


def test_a_wrapper_gives_its_place_to_the_optimizer_that_it_holds(model: nn.Module) -> None:
    found, inner = hooked(model), SGD(model.parameters(), lr=0.1)
    wrapper = Wrapper.__new__(Wrapper)
    Optimizer.__init__(wrapper, inner.param_groups, {})
    found.add(wrapper)
    assert list(found.members) == [wrapper]
    assert found.is_only(wrapper) is False, "it may still become a wrapper"
    wrapper.inner = inner
    found.find_wrappers()
    assert list(found.members) == [inner]
    assert found.is_wrapper(wrapper)
    assert not found.is_wrapper(inner)
    assert found.is_only(inner)
    other = AdamW(model.parameters())
    found.add(other)
    found.find_wrappers()
    assert not found.is_only(inner)


def test_the_next_optimizer_of_the_model_takes_over_and_no_other(model: nn.Module) -> None:
    found, first, second = hooked(model), SGD(model.parameters(), lr=0.1), AdamW(model.parameters())
    found.add(first)
    assert found.take_over(first) == ""
    assert found.take_over(SGD(nn.Linear(2, 2).parameters(), lr=0.1)) == ""
    assert found.take_over(second) == "another optimizer updates the model"
    assert found.has_hooks(second)
    assert list(found.members) == [first, second]


@pytest.mark.parametrize("table", ["_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"])
def test_hooks_that_the_user_clears_are_put_back(model: nn.Module, table: str) -> None:
    found, optimizer = hooked(model), SGD(model.parameters(), lr=0.1)
    found.add(optimizer)
    getattr(optimizer, table).clear()
    assert not found.has_hooks(optimizer)
    assert found.take_over(optimizer) == "the hooks of the optimizer are gone"
    assert found.has_hooks(optimizer)


def test_a_hook_that_came_later_comes_first_from_the_next_step_on(model: nn.Module) -> None:
    calls = Calls()
    found, optimizer = hooked(model, calls), SGD(model.parameters(), lr=0.1)
    found.add(optimizer)
    optimizer.register_step_pre_hook(CircuitBreaker("a further agent").hook(lambda *_: calls.append("ours")))
    found.come_last(optimizer)
    optimizer.step()
    assert calls[:2] == ["before", "ours"]
    optimizer.register_step_pre_hook(lambda *_: calls.append("theirs"))
    for expected in (["before", "ours", "theirs"], ["ours", "theirs", "before"]):
        calls.clear()
        optimizer.step()
        assert calls[:3] == expected
        found.come_last(optimizer)
