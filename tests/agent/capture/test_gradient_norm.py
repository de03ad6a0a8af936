"""The norm of gradients of any kind, each counted once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from koopmon.agent.capture.gradient_norm import GradientNorm


def parameter(*values: float, dtype: torch.dtype = torch.float32, gradient: bool = True) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(len(values), dtype=dtype))
    made.grad = torch.tensor(values, dtype=dtype) if gradient else None
    return made


def value(norm: float | Tensor | None) -> float | None:
    return None if norm is None else float(norm)


def test_each_parameter_counts_once() -> None:
    norm, one, two = GradientNorm(), parameter(3.0), parameter(4.0, 12.0)
    norm.add([one, parameter(9.0, gradient=False)])
    norm.add([one, two, two])  # a wrapper and its inner optimizer hold the same
    norm.add([two])
    assert value(norm.end()) == pytest.approx(13.0)
    assert norm.end() is None, "the next step begins without any"
    norm.add([one])
    assert value(norm.end()) == pytest.approx(3.0)
    norm.add([one])
    norm.clear()
    assert norm.end() is None


def test_it_equals_the_norm_that_clipping_computes() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (1, 7, 300)]
    for each in parameters:
        each.grad = torch.randn(each.shape, generator=generator)
    norm = GradientNorm()
    norm.add(parameters)
    expected = float(nn.utils.clip_grad_norm_(parameters, 1e9))
    assert value(norm.end()) == pytest.approx(expected, rel=1e-6), "the parts are added in float64"


def test_the_scale_of_each_optimizer() -> None:
    norm, one, two = GradientNorm(), parameter(30.0), parameter(8.0)
    norm.add([one], torch.tensor(10.0))
    norm.add([two], torch.tensor([2.0]))
    assert value(norm.end()) == pytest.approx(5.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_gradients_of_few_bits_do_not_overflow(dtype: torch.dtype) -> None:
    norm = GradientNorm()
    norm.add([parameter(3e4, 4e4, dtype=dtype), parameter(1.0)])
    assert value(norm.end()) == pytest.approx(5e4, rel=1e-2)


@pytest.mark.parametrize(("gradient", "expected"), [(math.inf, math.inf), (math.nan, math.nan), (0.0, 0.0)])
def test_a_gradient_that_is_not_finite_shows(gradient: float, expected: float) -> None:
    norm = GradientNorm()
    norm.add([parameter(1.0, gradient) if gradient else parameter(0.0)])
    assert value(norm.end()) == pytest.approx(expected, nan_ok=True)


def test_sparse_and_empty_gradients() -> None:
    sparse, empty = nn.Parameter(torch.zeros(4, 1)), parameter()
    sparse.grad = torch.sparse_coo_tensor([[1, 1, 3]], [[1.0], [2.0], [4.0]], (4, 1), check_invariants=True)
    norm = GradientNorm()
    norm.add([sparse, empty])
    assert value(norm.end()) == pytest.approx(5.0), "entries at one place are added"


def test_a_part_on_another_rank_makes_it_unknown() -> None:
    class Part(Tensor):
        def to_local(self) -> Tensor:
            return self

    norm, sharded = GradientNorm(), parameter(3.0)
    sharded.grad = torch.ones(1).as_subclass(Part)
    norm.add([parameter(1.0)])
    norm.add([sharded])
    norm.add([parameter(1.0)])
    assert norm.end() is None
    norm.add([parameter(1.0)])
    assert value(norm.end()) == 1.0


def test_on_a_device_nothing_waits_for_a_value() -> None:
    """The meta device stands for an accelerator: a wait for one of its values raises."""
    away = nn.Parameter(torch.zeros(3, device="meta"))
    away.grad = torch.zeros(3, device="meta")
    norm = GradientNorm()
    norm.add([parameter(3.0)])
    norm.add([away], torch.empty(1, device="meta"))
    found = norm.end()
    assert isinstance(found, Tensor)
    assert found.is_meta
