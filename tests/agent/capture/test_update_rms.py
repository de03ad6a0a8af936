"""Gradients over second moments, for optimizers of several kinds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop

from koopmon.agent.capture.update_rms import UpdateRms


def trained(kind: Any, steps: int = 5, **settings: Any) -> tuple[list[nn.Parameter], Optimizer]:
    """Return parameters and an optimizer after some steps on gradients of all signs with one size."""
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 40)]
    optimizer = kind(parameters, lr=1e-3, **settings)
    for step in range(steps):
        for each in parameters:
            each.grad = torch.full(each.shape, 0.5 * (-1) ** step)
        optimizer.step()
    return parameters, optimizer


def rms(*optimizers: Optimizer) -> float | None:
    found = UpdateRms()
    for each in optimizers:
        found.add(each)
    value = found.end()
    assert found.end() is None, "the next step begins without any"
    return None if value is None else float(value)


@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam, RAdam])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_a_gradient_of_the_usual_size_gives_one(kind: Any, steps: int) -> None:
    _, optimizer = trained(kind, steps)
    assert rms(optimizer) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": True}, {"capturable": False}, {"amsgrad": True}])
def test_a_gradient_ten_times_as_large_gives_ten(settings: dict[str, Any]) -> None:
    parameters, optimizer = trained(AdamW, **settings)
    for each in parameters:
        each.grad = 10.0 * torch.ones_like(each) * 0.5
    assert rms(optimizer) == pytest.approx(10.0, rel=1e-3)


def test_each_parameter_counts_alike() -> None:
    parameters, optimizer = trained(AdamW)
    parameters[0].grad = torch.full((3,), 5.0)
    assert rms(optimizer) == pytest.approx(math.sqrt((100 + 1) / 2), rel=1e-3)
    parameters[0].grad = None
    assert rms(optimizer) == pytest.approx(1.0, rel=1e-3)


def test_second_moments_that_are_stale() -> None:
    parameters, optimizer = trained(AdamW)
    for each in parameters:
        optimizer.state[each]["exp_avg_sq"].mul_(1e-4)
    assert rms(optimizer) == pytest.approx(100.0, rel=1e-3)


@pytest.mark.parametrize("kind", [SGD, RMSprop])
def test_an_optimizer_without_second_moments_has_no_value(kind: Any) -> None:
    _, optimizer = trained(kind)
    assert rms(optimizer) is None
    _, other = trained(AdamW)
    assert rms(optimizer, other) == pytest.approx(1.0, rel=1e-3)


def test_before_the_first_step_there_is_no_value() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AdamW([parameter])
    assert rms(optimizer) is None
    parameter.grad = torch.ones(3)
    assert rms(optimizer) is None
    assert not optimizer.state, "reading the state has not made one"


def _quantised(state: dict[str, Any]) -> None:
    state["exp_avg_sq"] = torch.zeros(2, dtype=torch.uint8)


def _absent(state: dict[str, Any]) -> None:
    del state["exp_avg_sq"]


def _zero(state: dict[str, Any]) -> None:
    state["exp_avg_sq"].zero_()


@pytest.mark.parametrize("spoil", [_quantised, _absent, _zero])
def test_a_moment_that_says_nothing_does_not_count(spoil: Any) -> None:
    parameters, optimizer = trained(AdamW)
    spoil(optimizer.state[parameters[0]])
    assert rms(optimizer) == pytest.approx(1.0, rel=1e-3)


def test_sparse_gradients_do_not_count() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    _, optimizer = trained(AdamW)
    optimizer.add_param_group({"params": [embedding.weight]})
    assert rms(optimizer) == pytest.approx(1.0, rel=1e-3)


def test_the_scale_of_a_grad_scaler_is_taken_out() -> None:
    parameters, optimizer = trained(AdamW)
    for each in parameters:
        each.grad = torch.full(each.shape, 0.5 * 1024.0)
    optimizer.grad_scale = torch.tensor([1024.0])  # type: ignore[attr-defined]
    assert rms(optimizer) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradients_that_are_not_finite(value: float) -> None:
    parameters, optimizer = trained(AdamW)
    for each in parameters:
        each.grad = torch.full(each.shape, value)
    found: Any = rms(optimizer)
    assert not math.isfinite(found)


def test_this_ranks_part_of_a_sharded_parameter_counts() -> None:
    class Sharded:
        is_sparse = False

        def __init__(self, local: Tensor) -> None:
            self.local = local

        def to_local(self) -> Tensor:
            return self.local

    from koopmon.agent.capture import update_rms

    assert update_rms._local(Sharded(torch.ones(2))).tolist() == [1.0, 1.0]


def test_on_a_device_nothing_waits_for_a_value() -> None:
    """The meta device stands for an accelerator: a wait for one of its values raises."""
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    parameter.grad = torch.zeros(3, device="meta")
    _, optimizer = trained(AdamW)
    optimizer.add_param_group({"params": [parameter]})
    optimizer.state[parameter] = {"exp_avg_sq": torch.zeros(3, device="meta"), "step": torch.tensor(2.0)}
    found = UpdateRms()
    found.add(optimizer)
    value: Any = found.end()
    assert value.is_meta
    assert value.shape == ()


def test_a_scale_on_another_device_leaves_it_unknown() -> None:
    _, optimizer = trained(AdamW)
    optimizer.grad_scale = torch.empty(1, device="meta")  # type: ignore[attr-defined]
    assert rms(optimizer) is None
