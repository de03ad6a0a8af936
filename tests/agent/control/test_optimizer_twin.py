"""The copy of an optimizer: its parameters, options and state, and what it shares with the training."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from koopmon.agent.control.optimizer_twin import NOMINAL_RATE, clone_of, make_twin, readable_rate


def trained(*optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_copy_has_the_sampled_parameters_and_their_state_alone(fresh: bool) -> None:
    first, second = pair()
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}])
    trained(optimizer)
    clone = clone_of(second, from_zero=fresh)
    twin = make_twin(optimizer, [second], [clone], fresh=fresh)
    (group,) = twin.param_groups
    assert group["params"] == [clone]
    assert group["lr"] == 0.2
    assert set(twin.state) == (set() if fresh else {clone})


def test_a_step_of_the_copy_leaves_the_training_as_it_was() -> None:
    first, second = pair()
    optimizer = torch.optim.AdamW([first, second], lr=0.1)
    trained(optimizer)
    before = [first.detach().clone(), second.detach().clone(), optimizer.state[second]["exp_avg"].clone()]
    clone = clone_of(second, from_zero=False)
    trained(make_twin(optimizer, [second], [clone], fresh=False))
    assert not torch.equal(clone, second)
    after = [first, second, optimizer.state[second]["exp_avg"]]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_hooks_and_what_cannot_be_copied_stay_behind() -> None:
    first, second = pair()
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    calls: list[object] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer.__dict__["lock"] = threading.Lock()
    twin = make_twin(optimizer, [first], [clone_of(first, from_zero=False)], fresh=False)
    trained(twin)
    assert calls == []
    assert "lock" not in vars(twin)


@pytest.mark.parametrize("rate", [0.0, torch.zeros(())])
def test_a_rate_of_zero_is_a_nominal_one_in_the_copy(rate: float | torch.Tensor) -> None:
    first, _ = pair()
    optimizer = torch.optim.SGD([first], lr=rate)
    twin = make_twin(optimizer, [first], [clone_of(first, from_zero=False)], fresh=False)
    assert float(twin.param_groups[0]["lr"]) == pytest.approx(NOMINAL_RATE)
    assert float(optimizer.param_groups[0]["lr"]) == 0.0


def test_a_list_with_a_tensor_for_each_parameter_keeps_the_sampled_ones() -> None:
    first, second = pair()
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    optimizer.param_groups[0]["anchors"] = [first.detach() * 2, second.detach() * 3]
    optimizer.param_groups[0]["names"] = ["first", "second"]
    twin = make_twin(optimizer, [second], [clone_of(second, from_zero=False)], fresh=False)
    (anchor,) = twin.param_groups[0]["anchors"]
    assert torch.equal(anchor, torch.full((4,), 3.0))
    assert twin.param_groups[0]["names"] == ["first", "second"]


def test_a_clone_has_the_attributes_of_its_parameter() -> None:
    first, _ = pair()
    first.use_muon = True  # type: ignore[attr-defined]
    clone = clone_of(first, from_zero=True)
    assert clone.use_muon
    assert not clone.any()


@pytest.mark.parametrize(("rate", "value"), [(0.1, 0.1), (torch.tensor(0.5), 0.5), (None, None), ("fast", None)])
def test_a_rate_is_readable_if_it_is_a_number(rate: object, value: float | None) -> None:
    assert readable_rate(rate) == value
