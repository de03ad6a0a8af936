"""An update on a view moves the weights at the scaled rate. The optimizer's own groups hold the user's at all times."""

from __future__ import annotations

import copy
import io
import random
import signal
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from koopmon.agent.control.scaled_view import close_view, number, scaled_view

SCALE = 0.125


def weight(value: float = 0.0) -> nn.Parameter:
    parameter = nn.Parameter(torch.full((3,), value))
    parameter.grad = torch.ones(3)
    return parameter


def scaled(optimizer: Optimizer, **options: Any) -> Callable[[], None]:
    """Run every update of `optimizer` on a view, as the agent does, without a post-hook."""

    def before(each: Optimizer, args: Any, kwargs: Any) -> Any:
        return (scaled_view(each, SCALE, **options), *args[1:]), kwargs

    return optimizer.register_step_pre_hook(before).remove


class SelfDecaying(SGD):
    """Keeps its own schedule in the group."""

    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0.5
        return out


class SelfDecayingByUpdate(SGD):
    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        for group in self.param_groups:
            group.update(lr=group.pop("lr") * 0.5)
        return out


class Setting(SGD):
    """Sets its rate from its own count, and then reads it."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.calls
        return super().step(closure)


class Tensorial(SGD):
    """Lowers a rate in a tensor, in place."""

    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        for group in self.param_groups:
            group["lr"].mul_(0.5)
        return out


@pytest.mark.parametrize(
    ("make", "rate", "options"),
    [
        (SelfDecaying, 0.1, {}),
        (SelfDecayingByUpdate, 0.1, {}),
        (SelfDecaying, numpy.float32(0.125), {}),
        (SelfDecaying, torch.tensor(0.125), {}),
        (Tensorial, torch.tensor(0.125), {}),
        (Tensorial, torch.tensor(0.125, dtype=torch.float64), {}),
        (Setting, 0.1, {"sets_rate": True}),
    ],
)
def test_a_rate_that_the_step_changes_is_the_users_own_change(make: Any, rate: Any, options: dict[str, Any]) -> None:
    plain, ours = make([weight()], lr=copy.deepcopy(rate)), make([weight()], lr=copy.deepcopy(rate))
    before, moved = 0.0, []
    for _ in range(4):
        plain.step()
        view = scaled_view(ours, SCALE, **options)
        type(ours).step.__wrapped__(view)
        close_view(view, ours)
        assert float(ours.param_groups[0]["lr"]) == pytest.approx(float(plain.param_groups[0]["lr"]), rel=1e-6)
        assert type(ours.param_groups[0]["lr"]) is type(plain.param_groups[0]["lr"])
        moved.append(float(ours.param_groups[0]["params"][0][0].detach()) - before)
        before += moved[-1]
    assert moved == pytest.approx(
        [-SCALE * float(rate) / each for each in ([1, 2, 4, 8], [1, 2, 3, 4])[make is Setting]]
    )


@pytest.mark.parametrize(
    "rate",
    [0.1, 1, numpy.float32(0.1), numpy.float64(0.1), numpy.array(0.1), torch.tensor(0.1), torch.tensor([0.1])],
    ids=repr,
)
def test_every_kind_of_number_is_scaled_and_stays_the_same_object(rate: Any) -> None:
    parameter = weight()
    optimizer = SGD([parameter], lr=0.5, foreach=False)
    optimizer.param_groups[0]["lr"] = rate
    before = copy.deepcopy(rate)
    scaled(optimizer)
    optimizer.step()
    assert float(parameter[0].detach()) == pytest.approx(-SCALE * float(before))
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == float(before)


@pytest.mark.parametrize("rate", [None, "0.1"])
def test_a_value_that_is_no_number_is_passed_through(rate: Any) -> None:
    optimizer = SGD([weight()], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    (group,) = scaled_view(optimizer, SCALE).param_groups
    assert group["lr"] == rate


def test_a_rate_that_a_later_hook_or_the_closure_sets_is_scaled() -> None:
    parameter = weight()
    optimizer = SGD([parameter], lr=0.1)
    scaled(optimizer)
    optimizer.register_step_pre_hook(lambda each, *_: each.param_groups[0].update(lr=0.4))

    def closure() -> float:
        optimizer.param_groups[0]["lr"] *= 2.0
        return 0.0

    optimizer.step(closure)
    assert float(parameter[0].detach()) == pytest.approx(-SCALE * 0.8)
    assert optimizer.param_groups[0]["lr"] == 0.8


def test_attributes_state_and_groups_that_the_step_writes_are_the_optimizers_own() -> None:
    class Busy(AdamW):
        def step(self, closure: Any = None) -> Any:
            self.count = getattr(self, "count", 0) + 1
            for group in self.param_groups:
                group["seen"] = group.setdefault("seen", 0) + 1
                del group["betas"]
            self.param_groups.append({**self.param_groups[0], "params": []})
            return None

    optimizer = Busy([weight()], lr=0.1)
    view = scaled_view(optimizer, SCALE)
    Busy.step(view)
    close_view(view, optimizer)
    assert isinstance(view, Busy)
    assert optimizer.count == 1
    assert [group["seen"] for group in optimizer.param_groups] == [1, 1]
    assert "betas" not in optimizer.param_groups[0]
    assert view.state is optimizer.state


def test_a_group_of_the_view_is_a_dict_for_any_reader() -> None:
    (group,) = scaled_view(SGD([weight()], lr=0.8, momentum=0.9), SCALE).param_groups
    readers: list[Callable[[Any], Any]] = [
        dict,
        lambda each: {**each},
        lambda each: each.copy(),
        lambda each: each | {},
    ]
    for reader in readers:
        assert (reader(group)["lr"], reader(group)["momentum"]) == (pytest.approx(0.1), 0.9)
    assert isinstance(group, dict)
    assert dict.__getitem__(group, "lr") == pytest.approx(0.1), "for an extension that reads the dict itself"
    assert group.get("lr") == pytest.approx(0.1)
    assert group.get("other", 3) == 3
    assert dict(group.items())["lr"] == pytest.approx(0.1)
    assert "lr" in group
    assert len(group) == len(list(group))
    saved = copy.deepcopy(group)
    assert type(saved) is dict
    assert saved["lr"] == 0.8, "a copy outlives the update"


def test_the_dict_itself_and_its_text_follow_what_the_step_writes() -> None:
    (group,) = scaled_view(SGD([weight()], lr=0.8), SCALE).param_groups
    group["lr"] = 0.05
    del group["momentum"]
    assert dict.__getitem__(group, "lr") == 0.05
    assert not dict.__contains__(group, "momentum")
    assert repr(group) == repr(dict(group))


@pytest.mark.parametrize("written", [None, "0.1"])
def test_a_value_that_is_no_number_reaches_the_group(written: Any) -> None:
    optimizer = SGD([weight()], lr=0.1)
    (group,) = scaled_view(optimizer, SCALE).param_groups
    group["lr"] = written
    assert optimizer.param_groups[0]["lr"] == written


def test_a_tensor_that_the_step_changes_in_place_is_changed_at_once_and_once() -> None:
    rate = torch.tensor(0.8)
    optimizer = SGD([weight()], lr=rate)
    view = scaled_view(optimizer, SCALE)
    (group,) = view.param_groups
    group["lr"] *= 0.5
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.4)
    group["lr"].mul_(0.5)
    assert float(group["lr"]) == pytest.approx(SCALE * 0.2), "a read between two changes"
    group["lr"].mul_(0.5)
    close_view(view, optimizer)
    assert float(rate) == pytest.approx(0.1)
    rate.fill_(0.6)  # by the user
    close_view(view, optimizer)
    assert float(rate) == pytest.approx(0.6)


def test_a_step_that_takes_its_groups_one_at_a_time_moves_each_once() -> None:
    class Parts(SGD):
        def step(self, closure: Any = None) -> Any:
            groups = self.param_groups
            for each in groups:
                self.param_groups = [each]
                SGD.step.__wrapped__(self)  # type: ignore[attr-defined]
            self.param_groups = groups

    parts = [weight(), weight()]
    optimizer = Parts([{"params": [each]} for each in parts], lr=0.8)
    view = scaled_view(optimizer, SCALE)
    Parts.step.__wrapped__(view)  # type: ignore[attr-defined]
    close_view(view, optimizer)
    assert [float(each[0].detach()) for each in parts] == pytest.approx([-0.1, -0.1])
    assert len(optimizer.param_groups) == 2


def test_a_group_that_the_step_adds_to_both_is_there_once() -> None:
    optimizer = SGD([weight()], lr=0.1)
    view = scaled_view(optimizer, SCALE)
    added = {"params": [weight()], "lr": 0.1}
    for each in (view, optimizer):
        each.param_groups.append(added)
    close_view(view, optimizer)
    assert len(optimizer.param_groups) == 2
    assert optimizer.param_groups[1] is added


@pytest.mark.parametrize(
    ("rate", "value"),
    [(0.5, 0.5), (2, 2.0), (numpy.float32(0.5), 0.5), (torch.tensor(0.5), 0.5)]
    + [(each, None) for each in (None, "0.5", [], {}, torch.ones(2))],
    ids=repr,
)
def test_a_rate_in_host_memory_is_a_number_or_none(rate: Any, value: float | None) -> None:
    assert number(rate) == value


class Raising(SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        raise RuntimeError("no step")


def test_after_a_step_that_raised_the_scheduler_continues_from_the_users_rate() -> None:
    optimizer = Raising([weight()], lr=0.1)
    scaled(optimizer)
    schedule = ExponentialLR(optimizer, 0.5)
    for step in range(8):
        with pytest.raises(RuntimeError, match="no step"):
            optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (step + 1))


def test_a_post_hook_of_the_user_that_was_registered_first_sees_the_users_rate() -> None:
    optimizer = SGD([weight()], lr=0.1)
    schedule = ExponentialLR(optimizer, 0.5)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    scaled(optimizer)
    for _ in range(16):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**16)


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: AdamW(parameters, lr=0.1),
    "tensor": lambda parameters: Adam(parameters, lr=torch.tensor(0.1)),
    "decaying": lambda parameters: Constant(parameters, lr=0.1),
}


class Constant(SGD):
    """Writes back the rate that it has read."""

    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        for group in self.param_groups:
            group["lr"] = group["lr"] * 1.0
        return out


@pytest.mark.parametrize("name", MAKERS)
def test_random_interruptions_see_and_save_the_users_rate(name: str) -> None:
    """A signal handler runs between any two instructions of the update: 1,000 times in all."""
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(20)]
    for each in parameters:
        each.grad = torch.ones(4)
    optimizer = MAKERS[name]([{"params": parameters[:10]}, {"params": parameters[10:], "lr": torch.tensor(0.1)}])
    scaled(optimizer)
    expected = {float(torch.tensor(0.1)), 0.1}
    inside = [0]
    found: set[float] = set()
    random.seed(0)

    def save(*_: object) -> None:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)["param_groups"]
        for groups in (saved, optimizer.param_groups, copy.deepcopy(optimizer).param_groups):
            found.update(float(group["lr"]) for group in groups)
        inside[0] += running[0]

    before = signal.signal(signal.SIGALRM, save)
    running = [False]
    try:
        for _ in range(250):
            arrived, handled = inside[0], False
            while not handled:
                running[0] = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1e-3))
                optimizer.step()
                running[0] = False
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                handled = inside[0] > arrived
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert inside[0] >= 250
    assert found <= expected


def test_a_step_that_is_interrupted_by_an_exception_leaves_the_users_rate() -> None:
    class Interrupted(SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr"] = group["lr"] * 1.0
                raise KeyboardInterrupt

    optimizer = Interrupted([weight()], lr=0.1)
    scaled(optimizer)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_rate_with_a_gradient_of_its_own_keeps_it() -> None:
    rate = torch.tensor(0.1, requires_grad=True)
    optimizer = SGD([weight()], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    seen: Tensor = scaled_view(optimizer, SCALE).param_groups[0]["lr"]
    seen.backward()
    assert float(rate.grad or 0.0) == SCALE


def test_a_rate_on_a_device_is_neither_read_nor_moved() -> None:
    """A tensor without storage stands for a device: reading its value raises."""
    optimizer = SGD([weight()], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate = torch.tensor(0.2, device="meta")
    view = scaled_view(optimizer, SCALE)
    assert view.param_groups[0]["lr"].device == rate.device
    view.param_groups[0]["lr"].mul_(0.5)
    close_view(view, optimizer)
    assert optimizer.param_groups[0]["lr"] is rate


def test_a_group_has_a_factor_of_its_own_beside_the_scale() -> None:
    optimizer = SGD([{"params": [weight()], "lr": rate} for rate in (1.0, 8.0, 4.0)], lr=0.1)
    view = scaled_view(optimizer, 0.5, factors=[1.0, 0.125])
    assert [group["lr"] for group in view.param_groups] == [0.5, 0.5, 2.0], "those after the last factor have the scale"
    view.param_groups[1]["lr"] = 0.25
    view.add_param_group({"params": [weight()], "lr": 1.0})
    close_view(view, optimizer)
    assert [group["lr"] for group in optimizer.param_groups[:3]] == [1.0, 4.0, 4.0], "the user's rates"
    view = scaled_view(optimizer, 0.5, factors=[1.0, 0.125, 1.0, 1.0, 0.1, 0.1])
    assert len(view.param_groups) == len(optimizer.param_groups) == 4
    close_view(view, optimizer)
