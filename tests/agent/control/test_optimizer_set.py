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


def test_the_outermost_wrapper_of_a_member_is_known_whichever_is_added_first() -> None:
    one = weights()
    inner = SGD(one, lr=0.1)
    optimizers = OptimizerSet(inner)
    assert optimizers.wrapper_of(inner) is None
    wrapper = Wrapper(one, inner)
    for each in (wrapper, inner):
        optimizers.add(each)
        assert optimizers.wrapper_of(inner) is wrapper
    outer = Wrapper(one, wrapper)
    optimizers.add(outer)
    assert optimizers.wrapper_of(inner) is outer


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


def grouped(*rates: Any) -> tuple[list[nn.Parameter], SGD]:
    """An optimizer with one group of two weights for each rate."""
    held = weights(2 * len(rates))
    groups = [{"params": held[2 * each : 2 * each + 2], "lr": rate} for each, rate in enumerate(rates)]
    return held, SGD(groups, lr=0.1)


def test_a_bound_is_in_every_rate_that_is_read() -> None:
    _, optimizer = grouped(0.1, 3.0)
    members = OptimizerSet(optimizer)
    assert (members.rates(), members.factors(optimizer)) == ((0.1, 3.0), [])
    assert members.bound({1: 0.5})
    assert not members.bound({1: 0.5}), "the same again"
    assert members.rates() == pytest.approx((0.1, 0.05))
    assert members.factors(optimizer) == pytest.approx([1.0, 1 / 60])
    assert members.largest_rate() == 0.1
    optimizer.param_groups[0]["lr"] = 0.001
    assert members.largest_rate() == 0.001
    assert members.rates()[1] == pytest.approx(0.0005)
    optimizer.param_groups[1]["lr"] = 0.0001
    assert members.rates() == (0.001, 0.0001), "a rate is never raised"
    assert members.bound({})
    assert members.factors(optimizer) == []


@pytest.mark.parametrize(
    ("strength", "factor"), [(1.0, 0.25), (0.5, 0.5), (0.0, 1.0), (-3.0, 1.0), (1e300, 0.25), (float("nan"), 1.0)]
)
def test_a_bound_fades_with_its_strength(strength: float, factor: float) -> None:
    _, optimizer = grouped(1.0, 4.0)
    members = OptimizerSet(optimizer)
    members.bound({1: 1.0}, strength)
    assert members.factors(optimizer) == [1.0, factor]
    members.bound({1: 1.0}, 1.0)
    assert members.factors(optimizer) == [1.0, 0.25]


def test_groups_are_numbered_over_all_members() -> None:
    _, first = grouped(0.1, 0.1)
    _, second = grouped(0.1, 3.0, 0.2)
    members = OptimizerSet([first, second])
    members.bound({3: 0.5, 9: 0.5})
    assert members.factors(first) == [1.0, 1.0]
    assert members.factors(second) == pytest.approx([1.0, 0.1 / 3.0, 1.0])
    assert members.largest_rate() == 0.2


def test_a_bound_follows_its_weights_into_a_new_optimizer() -> None:
    held, first = grouped(0.1, 3.0)
    _, other = grouped(0.1)
    members = OptimizerSet([first, other])
    members.bound({1: 1.0})
    new = SGD([{"params": held[2:3], "lr": 3.0}, {"params": held[:2], "lr": 0.1}, {"params": [], "lr": 0.1}], lr=0.1)
    del first
    gc.collect()
    members.add(new)
    assert members.factors(other) == [1.0]
    assert members.factors(new) == pytest.approx([0.1 / 3.0, 1.0, 1.0])
    assert members.largest_rate() == 0.1


def test_a_group_of_another_ranks_weights_is_bounded_too() -> None:
    """Under ZeroRedundancyOptimizer a rank may hold none of a group. Its largest rate is that of the other ranks."""
    held = weights(1)
    optimizer = SGD([{"params": held, "lr": 0.1}, {"params": [], "lr": 3.0}])
    members = OptimizerSet(optimizer)
    members.bound({1: 1.0})
    assert members.largest_rate() == 0.1


def test_rates_that_cannot_be_read_have_no_bound() -> None:
    _, optimizer = grouped(0.1, 3.0)
    members = OptimizerSet(optimizer)
    members.bound({1: 1.0})
    for rate in (None, torch.ones((), device="meta")):
        optimizer.param_groups[0]["lr"] = rate
        assert (members.rates(), members.factors(optimizer)) == ((), [])
    assert members.largest_rate() is optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    assert members.rates() == pytest.approx((0.1, 0.1))


def test_groups_that_a_new_optimizer_joins_have_the_lower_bound() -> None:
    held, first = grouped(1.0, 8.0, 8.0)
    members = OptimizerSet(first)
    members.bound({1: 0.5, 2: 2.0})
    new = SGD([{"params": held[:2], "lr": 1.0}, {"params": held[2:], "lr": 8.0}])
    del first
    gc.collect()
    members.add(new)
    assert members.factors(new) == [1.0, 0.5 / 8.0]
