"""One step per update that follows a backward pass, however many calls it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from koopmon.agent.control.step_clock import StepClock, is_nested, running_wrapper


class Training:
    """Two layers and a clock on their optimizers, driven as the runtime does. `visible`: forwards are noticed."""

    def __init__(self, *optimizers: Callable[[nn.Sequential], Optimizer], visible: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        self.clock = StepClock()
        self.begun = 0
        self.optimizers: list[Optimizer] = []
        for make in optimizers:
            self.add(make(self.model))
        self.visible = visible

    def add(self, optimizer: Optimizer) -> Optimizer:
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)
        self.optimizers.append(optimizer)
        return optimizer

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_nested(optimizer):
            if self.clock.begins_step(optimizer, args, kwargs):
                if self.clock.open:
                    self.clock.end_step()
                self.clock.begin_step(self.optimizers)
                self.begun += 1
            self.clock.begin(optimizer)

    def after(self, optimizer: Optimizer, *_: Any) -> None:
        if not is_nested(optimizer) and self.clock.end(optimizer):
            self.clock.end_step()

    def loss(self) -> Tensor:
        if self.visible and self.clock.on_forward():
            self.clock.end_step()
        return self.model(torch.ones(2, 3)).square().sum()

    def backward(self) -> None:
        for each in self.optimizers:
            each.zero_grad()
        self.loss().backward()


def whole(model: nn.Sequential) -> Optimizer:
    return SGD(model.parameters(), lr=0.01)


def first(model: nn.Sequential) -> Optimizer:
    return SGD(model[0].parameters(), lr=0.01)


def second(model: nn.Sequential) -> Optimizer:
    return AdamW(model[1].parameters(), lr=0.01)


class Failing(SGD):
    fails = False

    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        if self.fails:
            raise ArithmeticError
        return out


class CallsParent(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class CallsParentTwice(CallsParent):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize("kind", [SGD, CallsParent, CallsParentTwice])
def test_a_step_that_calls_its_parents_is_one_step(kind: type[SGD], visible: bool) -> None:
    for parent in (SGD, CallsParent):
        parent([nn.Parameter(torch.zeros(1))], lr=0.1)  # from here on its step calls hooks
    training = Training(lambda model: kind(model.parameters(), lr=0.01), visible=visible)
    for step in range(1, 5):
        training.backward()
        training.optimizers[0].step()
        assert (training.clock.num_steps, training.begun) == (step, step)


def test_hooks_of_the_outermost_and_the_innermost_class_alone_are_one_step() -> None:
    class Middle(SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Inner(Middle):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    training = Training(lambda model: Inner(model.parameters(), lr=0.01), visible=False)
    nested: list[bool] = []
    training.optimizers[0].register_step_pre_hook(lambda optimizer, *_: nested.append(is_nested(optimizer)))
    training.backward()
    training.optimizers[0].step()
    assert nested == [False, True]


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_repeated_calls_after_one_backward_are_one_step(calls: int, visible: bool, in_place: bool) -> None:
    training = Training(whole, visible=visible)
    for step in range(1, 5):
        training.optimizers[0].zero_grad(set_to_none=not in_place)
        training.loss().backward()
        for _ in range(calls):
            training.optimizers[0].step()
        assert (training.clock.num_steps, training.begun) == (step, step)


def test_parts_of_an_update_are_one_step() -> None:
    """An optimizer that steps each of its groups in a call of its own."""
    training = Training(lambda model: SGD([{"params": [each]} for each in model.parameters()], lr=0.01))
    (optimizer,) = training.optimizers
    groups = optimizer.param_groups
    for step in range(1, 4):
        training.backward()
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
        assert training.clock.num_steps == step


@pytest.mark.parametrize("visible", [True, False])
def test_several_optimizers_are_one_step_that_ends_with_the_last(visible: bool) -> None:
    training = Training(first, second, visible=visible)
    for step in range(1, 5):
        training.backward()
        training.optimizers[0].step()
        assert training.clock.num_steps == step - 1
        training.optimizers[1].step()
        assert (training.clock.num_steps, training.begun) == (step, step)


def test_an_optimizer_that_skips_steps_ends_them_at_the_next_forward() -> None:
    training = Training(first, second)
    for step in range(6):
        training.backward()
        assert training.clock.num_steps == step
        training.optimizers[0].step()
        if step % 3 == 0:
            training.optimizers[1].step()
    assert training.begun == 6


def test_a_new_optimizer_continues_the_count_of_one_that_is_gone() -> None:
    training = Training(first)
    for _ in range(3):
        training.backward()
        training.optimizers[0].step()
    training.optimizers.clear()
    training.add(whole(training.model))
    for _ in range(3):
        training.backward()
        training.optimizers[0].step()
    assert training.clock.num_steps == 6


@pytest.mark.parametrize("visible", [True, False])
def test_accumulated_gradients_are_one_step(visible: bool) -> None:
    training = Training(whole, visible=visible)
    for step in range(1, 4):
        training.optimizers[0].zero_grad(set_to_none=False)
        for _ in range(3):
            training.loss().backward()
        training.optimizers[0].step()
        assert training.clock.num_steps == step


def test_two_backward_passes_of_one_forward_are_two_steps() -> None:
    training = Training(lambda model: SGD(model.parameters(), lr=0.0))
    loss = training.loss()
    for step in range(1, 3):
        training.optimizers[0].zero_grad()
        loss.backward(retain_graph=True)
        training.before(training.optimizers[0], (training.optimizers[0],), {})  # no update: the graph needs the weights
        training.after(training.optimizers[0])
        assert training.clock.num_steps == step


def test_an_optimizer_in_the_backward_pass_ends_the_step_at_the_next_forward() -> None:
    training = Training()
    by_parameter = {each: training.add(SGD([each], lr=0.01)) for each in training.model.parameters()}

    def update(parameter: Tensor) -> None:
        by_parameter[parameter].step()
        by_parameter[parameter].zero_grad()

    for each in by_parameter:
        each.register_post_accumulate_grad_hook(update)
    for step in range(4):
        loss = training.loss()
        assert training.clock.num_steps == step
        loss.backward()
        assert training.begun == step + 1


def test_each_step_with_a_closure_is_a_step() -> None:
    training = Training(whole)

    def closure() -> Tensor:
        training.optimizers[0].zero_grad()
        loss = training.loss()
        loss.backward()
        return loss

    for step in range(1, 5):
        training.optimizers[0].step(closure) if step % 2 else training.optimizers[0].step(closure=closure)
        assert (training.clock.num_steps, training.begun) == (step, step)
    lbfgs = training.add(torch.optim.LBFGS(training.model.parameters(), max_iter=3))
    lbfgs.step(closure)
    assert training.clock.num_steps == 4, "SGD, which took part in the last step, may follow"
    lbfgs.step(closure)
    assert training.clock.num_steps == 6


def test_an_optimizer_after_one_with_a_closure_belongs_to_its_step() -> None:
    training = Training(first, second)
    training.backward()
    for each in training.optimizers:
        each.step()

    def closure() -> Tensor:
        training.backward()
        return torch.zeros(())

    for step in range(2, 5):
        training.optimizers[0].step(closure)
        assert training.clock.num_steps == step - 1
        training.optimizers[1].step()
        assert (training.clock.num_steps, training.begun) == (step, step)


def test_a_forward_in_the_closure_of_another_training_ends_the_step() -> None:
    training = Training(first, second)
    other = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    training.backward()
    training.optimizers[0].step()
    other.step(training.loss)
    assert training.clock.num_steps == 1
    training.optimizers[1].step()
    assert training.begun == 2


@pytest.mark.parametrize("visible", [True, False])
def test_a_call_without_a_gradient_belongs_to_the_step_before(visible: bool) -> None:
    training = Training(whole, visible=visible)
    for step in range(1, 4):
        training.backward()
        training.optimizers[0].step()
        training.optimizers[0].zero_grad()
        training.optimizers[0].step()
        assert (training.clock.num_steps, training.begun) == (step, step)


@pytest.mark.parametrize("visible", [True, False])
def test_a_call_before_the_training_is_no_step(visible: bool) -> None:
    training = Training(first, second, visible=visible)
    for each in training.optimizers:
        each.step()
    assert (training.clock.num_steps, training.begun) == (0, 0)
    for _ in range(3):
        training.backward()
        for each in training.optimizers:
            each.step()
    assert (training.clock.num_steps, training.begun) == (3, 3)


def test_a_step_waits_for_an_optimizer_whose_gradients_come_late() -> None:
    training = Training(first, second)
    for step in range(1, 4):
        training.backward()
        late = {each: each.grad for each in training.model[1].parameters() if step > 1}
        for each in late:
            each.grad = None
        training.optimizers[0].step()
        assert training.clock.num_steps == step - 1
        for each, gradient in late.items():
            each.grad = gradient
        training.optimizers[1].step()
        assert training.clock.num_steps == step


def test_optimizers_that_alternate_take_a_step_each() -> None:
    training = Training(first, second)
    for step in range(6):
        training.backward()
        assert training.clock.num_steps == step
        training.optimizers[step % 2].step()
    assert training.begun == 6


def test_optimizers_that_are_gone_leave_nothing_behind() -> None:
    training = Training(whole)
    for _ in range(5):
        training.optimizers = [training.add(whole(training.model))]  # made before the last one is gone
        gc.collect()
        training.backward()
        training.optimizers[0].step()
    assert training.clock.num_steps == 5
    assert len(training.clock._calls) <= 2


@pytest.mark.parametrize("raises", [0, 1])
def test_a_step_counts_although_a_later_call_in_it_raises(raises: int) -> None:
    training = Training(*(lambda model, part=part: Failing(model[part].parameters(), lr=0.01) for part in range(2)))
    training.backward()
    for each in training.optimizers:
        each.step()
    training.backward()
    training.optimizers[0].step()
    failing: Any = training.optimizers[raises]
    failing.fails = True
    with pytest.raises(ArithmeticError):
        failing.step()
    assert training.clock.num_steps == 1
    training.backward()
    assert training.clock.num_steps == 2


@pytest.mark.parametrize("visible", [True, False])
def test_a_step_that_raised_is_none_and_the_next_one_counts(visible: bool) -> None:
    SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    training = Training(lambda model: Failing(model.parameters(), lr=0.01), visible=visible)
    optimizer: Any = training.optimizers[0]
    for step in range(1, 4):
        for fails in (True, True, False):
            optimizer.fails = fails
            training.backward()
            if fails:
                with pytest.raises(ArithmeticError):
                    optimizer.step()
            else:
                optimizer.step()
        assert training.clock.num_steps == step


class Outer(SGD):
    """Calls the optimizer that it holds, after a method of its own."""

    def __init__(self, inner: Optimizer, call: Callable[[], Any]) -> None:
        self.__dict__ |= {"inner": inner, "call": call, "param_groups": inner.param_groups}

    def step(self, closure: Any = None) -> Any:
        return self.call()


def test_the_outermost_wrapper_that_runs_is_found_without_its_constructor() -> None:
    inner = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    middle = Outer(inner, lambda: running_wrapper(inner))
    outer = Outer(middle, middle.step)
    assert running_wrapper(inner) is None
    assert middle.step() is middle
    assert outer.step() is outer
    assert Outer(SGD(inner.param_groups, lr=0.1), lambda: running_wrapper(inner)).step() is None
