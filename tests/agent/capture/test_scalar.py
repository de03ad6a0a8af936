"""Scalars in host memory and on a device. The meta device stands for an accelerator: a wait for its values raises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from koopmon.agent.capture.scalar import added, divided, on_host, stacked

AWAY = torch.empty((), device="meta")


def test_only_scalars_on_the_cpu_become_numbers() -> None:
    assert on_host([torch.tensor(1.5), torch.tensor(2.5)]) == [1.5, 2.5]
    found = on_host([torch.tensor(1.5), AWAY])
    assert found[0] == 1.5
    assert found[1] is AWAY


@pytest.mark.parametrize("value", [2.0, torch.tensor(2.0)])
@pytest.mark.parametrize(("known", "expected"), [(None, 2.0), (1.0, 3.0), (torch.tensor(1.0), 3.0)])
def test_a_sum(known: Any, value: Any, expected: float) -> None:
    assert float(added(known, value)) == expected


@pytest.mark.parametrize(("known", "value"), [(AWAY, 2.0), (AWAY, torch.tensor(2.0)), (2.0, AWAY), (None, AWAY)])
def test_a_sum_with_a_part_on_a_device_stays_there(known: Any, value: Any) -> None:
    found: Any = added(known, value)
    assert found.is_meta


@pytest.mark.parametrize("value", [6.0, torch.tensor(6.0)])
@pytest.mark.parametrize(("divisor", "expected"), [(None, 6.0), (torch.tensor([2.0]), 3.0), (torch.zeros(1), math.inf)])
def test_a_quotient(value: Any, divisor: Tensor | None, expected: float) -> None:
    assert float(divided(value, divisor)) == expected


def test_a_quotient_by_a_scale_on_a_device_stays_there() -> None:
    found: Any = divided(6.0, AWAY)
    assert found.is_meta
    assert found.shape == ()


def test_a_number_keeps_its_digits() -> None:
    assert divided(1.0 + 1e-12, torch.tensor(1.0)) == 1.0 + 1e-12


def test_a_stack_lies_with_its_tensors() -> None:
    assert stacked([1.0, torch.tensor(2.0), 3.0]).tolist() == [1.0, 2.0, 3.0]
    assert stacked([1.0, AWAY]).is_meta
