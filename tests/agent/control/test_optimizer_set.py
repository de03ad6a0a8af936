"""The members are the optimizers that update the parameters, held weakly."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from koopmon.agent.control.optimizer_set import OptimizerSet


def weights(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]


class Wrapper(SGD):
    """Holds other optimizers in an attribute."""

    def __init__(self, params: Any, inner: Any) -> None:
        super().__init__(params, lr=0.1)
        self.inner = inner


class Sharded(Wrapper):
    """Like ZeroRedundancyOptimizer: the inner optimizer holds one rank's share of the parameters."""

    def consolidate_state_dict(self) -> None:
        raise NotImplementedError


class FusedLion8bit(SGD):
    """An optimizer with a name of another library."""


def test_a_wrapper_is_replaced_by_the_optimizers_that_it_holds() -> None:
    two = weights(2)
    first, second = SGD(two[:1], lr=0.1), SGD(two[1:], lr=0.1)
    for held in ([first, second], {"a": first, "b": second}, (first, Wrapper(two[1:], second))):
        assert list(OptimizerSet(Wrapper(two, held))) == [first, second]
    hybrid = Wrapper(two, first)
    assert list(OptimizerSet(hybrid)) == [first, hybrid], "it updates the second parameter itself"
    assert list(OptimizerSet(Sharded(two, first))) == [first]
    assert OptimizerSet(Sharded(two, first)).parameters == set(map(id, two))
    unrelated = Wrapper(two, SGD(weights(), lr=0.1))
    assert list(OptimizerSet(unrelated)) == [unrelated]
    first.owner = Wrapper(two[:1], first)  # type: ignore[attr-defined]
    assert list(OptimizerSet(first.owner)) == [first], "one that refers to its wrapper"  # type: ignore[attr-defined]


def test_members_are_added_once_and_leave_when_they_die() -> None:
    three = weights(3)
    first, second = SGD(three[:1], lr=0.1), SGD(three[1:2], lr=0.1)
    members = OptimizerSet([first, second])
    assert members.add(first) == []
    assert members.parameters == {id(three[0]), id(three[1])}
    del first
    gc.collect()
    third = SGD(three[2:], lr=0.1)
    assert members.add(third) == [third]
    assert list(members) == [second, third]
    assert members.parameters == {id(three[1]), id(three[2])}
    assert len(members._references) == 2


def test_members_stay_when_their_wrapper_dies_and_leave_when_they_die_in_it() -> None:
    two = weights(2)
    first, second = SGD(two[:1], lr=0.1), SGD(two[1:], lr=0.1)
    wrapper = Wrapper(two, [first, second])
    members = OptimizerSet(wrapper)
    wrapper.inner = [first]
    del second
    gc.collect()
    assert list(members) == [first]
    del wrapper
    gc.collect()
    assert members.parameters == {id(two[0])}
    other = SGD(weights(), lr=0.1)
    assert members.add(other) == [other]
    assert list(members) == [first, other]


def test_the_largest_rate_is_that_of_all_groups_of_all_members() -> None:
    three = weights(3)
    one = SGD([{"params": [each], "lr": rate} for each, rate in zip(three, (0.1, 0.3, 0.2), strict=True)])
    other = AdamW(weights(), lr=torch.tensor(0.25))
    both = OptimizerSet([one, other])
    assert both.largest_rate() == 0.3
    one.param_groups[1]["lr"] = None
    assert both.largest_rate() == 0.25
    assert type(both.largest_rate()) is float
    other.param_groups[0]["lr"] = device = torch.ones((), device="meta")
    assert both.largest_rate() is device
    assert OptimizerSet().largest_rate() is None


@pytest.mark.parametrize(
    ("make", "sized"),
    [
        (Adam, True),
        (AdamW, True),
        (torch.optim.NAdam, True),
        (torch.optim.RMSprop, True),
        (lambda params: FusedLion8bit(params, lr=0.1), True),
        (lambda params: Wrapper(params, AdamW(params)), True),
        (lambda params: SGD(params, lr=0.1), False),
        (torch.optim.LBFGS, False),
        (lambda params: Wrapper(params, SGD(params, lr=0.1)), False),
    ],
)
def test_adams_kin_is_told_by_its_name(make: Any, sized: bool) -> None:
    optimizer: Optimizer = make(weights())
    assert OptimizerSet(optimizer).rate_sized_steps() is sized
    assert OptimizerSet([optimizer, SGD(weights(), lr=0.1)]).rate_sized_steps() is False


def test_parameters_that_come_and_go_count_at_once() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = SGD([first], lr=0.1)
    members = OptimizerSet(optimizer)
    optimizer.add_param_group({"params": [second]})
    assert members.parameters == {id(first), id(second)}
    del optimizer.param_groups[0]
    assert members.parameters == {id(second)}


def test_a_member_updates_its_own_parameters_and_those_of_its_wrapper() -> None:
    own, other, rest = weights(1), weights(1), weights(1)
    first, second = SGD(own, lr=0.1), SGD(other, lr=0.1)
    wrapper = Sharded([*own, *rest], first)
    members = OptimizerSet(wrapper)
    members.add(second)

    def updated(member: Optimizer) -> list[int]:
        return list(map(id, members.updated_by(member)))

    assert updated(first) == list(map(id, [*own, *own, *rest]))
    assert updated(second) == list(map(id, other))
