"""Measured scalars: numbers where they lie in host memory, 0-d tensors on an accelerator, which nothing waits for.

Right after a training step, small operations of torch are slow: their code has left the processor's caches. On the CPU,
Python adds up the numbers of a small model in less time than a few such operations take.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scalar = float | Tensor


def on_host(scalars: Sequence[Tensor]) -> list[Scalar]:
    """Return 0-d tensors, those on the CPU as numbers."""
    return [each.item() if each.is_cpu else each for each in scalars]


def added(known: Scalar | None, value: Scalar) -> Scalar:
    """Return the sum, where `known` lies; `value` if there is none."""
    if known is None:
        return value
    return known + (value.to(known.device) if isinstance(known, Tensor) and isinstance(value, Tensor) else value)


def divided(value: Scalar, divisor: Tensor | None) -> Scalar:
    """Return `value` divided by a tensor with one element; `value` without one."""
    if divisor is None:
        return value
    if isinstance(value, Tensor):
        return value / divisor.reshape(()).to(value.device, value.dtype)
    if not divisor.is_cpu:
        return value / divisor.reshape(())
    return (value / divisor.reshape(()).double()).item()  # no exception for a scale that has fallen to zero


def stacked(scalars: Sequence[Scalar]) -> Tensor:
    """Return scalars as a 1-d tensor on the device of the first of them that is a tensor."""
    first = next(each for each in scalars if isinstance(each, Tensor))
    return torch.stack([torch.as_tensor(each, dtype=first.dtype, device=first.device) for each in scalars])
