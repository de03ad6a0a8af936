"""Learning-rate back-off: scales each parameter group's rate during `step()`, and restores the user's value after it.

Schedulers see only the values that they set, so that any of them composes: effective rate = schedule x scale, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

RATE_SIZED = ("adam", "lion", "rmsprop")
"""Parts of the names of optimizers that divide the gradient by its own size, or take its sign."""


@dataclass(slots=True)
class _ScaledRate:
    """One group's rate before and after scaling."""

    group: dict[str, Any]
    own: Any
    scaled: Any

    def restore(self) -> None:
        # Restore only the scaled value: after a step() that raised, the user may have set a new one.
        if self.group.get("lr") is self.scaled:
            self.group["lr"] = self.own


@dataclass(slots=True)
class _ScaledTensor:
    """A rate in a tensor. `copy` holds the user's value, `version` the version of `rate` after scaling."""

    rate: Tensor
    copy: Tensor
    version: int

    def restore(self) -> None:
        if self.rate._version == self.version:
            self.rate.copy_(self.copy)


class LrBackoff:
    """Scales the rates of one optimizer between `scale_rates` and `restore_rates`. A scale of 1 changes nothing."""

    def __init__(self) -> None:
        self._scaled: list[_ScaledRate | _ScaledTensor] = []
        self._copies: dict[int, Tensor] = {}
        self._in_closure = False

    @property
    def stranded(self) -> bool:
        """True while the parameter groups hold scaled rates although no step is underway: `step()` has raised.

        Valid only at the start of a forward. A forward inside a step belongs to its closure, as in Lightning.
        """
        return bool(self._scaled) and not self._in_closure

    def watch_closure(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments of `step()` with its closure wrapped; None without a closure.

        The wrapper marks the forwards that run inside the closure.
        """
        if not self._scaled:
            return None
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._watched(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._watched(args[1]), *args[2:]), kwargs
        return None

    def _watched(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def watched() -> Any:
            self._in_closure = True
            try:
                return closure()
            finally:
                self._in_closure = False

        return watched

    @torch.no_grad()
    def scale_rates(self, optimizer: Optimizer, scale: float) -> None:
        """Multiply each group's rate by `scale` in (0, 1]. Groups without a rate of their own are not changed."""
        self.restore_rates()  # if a step() raised, its post-hook never ran
        if scale == 1.0:
            return
        for index, group in enumerate(optimizer.param_groups):
            rate = group.get("lr")
            if isinstance(rate, Tensor):
                self._scale_tensor(index, rate, scale)
            elif isinstance(rate, (int, float)):
                group["lr"] = rate * scale
                self._scaled.append(_ScaledRate(group, rate, group["lr"]))

    def _scale_tensor(self, index: int, rate: Tensor, scale: float) -> None:
        # The graph of a capturable optimizer reads this very tensor: write in place, and never read its value.
        if any(isinstance(each, _ScaledTensor) and each.rate is rate for each in self._scaled):
            return  # several groups share one tensor
        copy = self._copies.get(index)
        if copy is None or copy.shape != rate.shape or copy.device != rate.device or copy.dtype != rate.dtype:
            copy = self._copies[index] = torch.empty_like(rate)
        copy.copy_(rate)
        rate.mul_(scale)
        self._scaled.append(_ScaledTensor(rate, copy, rate._version))

    @torch.no_grad()
    def restore_rates(self) -> None:
        """Restore every rate, bit for bit, except where the user has set a new one since."""
        while self._scaled:
            self._scaled.pop().restore()


def largest_rate(optimizer: Optimizer) -> float | Tensor | None:
    """Return the largest rate of the groups as the schedule set it.

    A rate on a device is returned as a tensor, unread.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    for rate in rates:
        if isinstance(rate, Tensor) and rate.device.type != "cpu":
            return rate
    known = [float(rate) for rate in rates if isinstance(rate, (int, float, Tensor))]
    return max(known) if known else None


def rate_sized_steps(optimizer: Optimizer) -> bool:
    """Return True if a step moves each weight by about the learning rate, regardless of the gradient's size.

    Adam and its variants do. The class names decide, because most of these classes are third-party (AdamW8bit,
    FusedAdam, Lion, ...). An optimizer that wraps another in `optim`, such as ZeroRedundancyOptimizer, counts as the
    inner one.
    """
    inner = getattr(optimizer, "optim", None)
    classes = type(inner if isinstance(inner, Optimizer) else optimizer).__mro__
    return any(kin in each.__name__.lower() for each in classes for kin in RATE_SIZED)
