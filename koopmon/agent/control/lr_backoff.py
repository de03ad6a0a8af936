"""Learning-rate back-off: each parameter group's rate times a scale during `step()`, the user's own value outside it.

Schedulers only ever see the values they set, so any of them composes: effective rate = schedule x scale, exactly.
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
        # Only what is still ours: after a step() that raised, the user may have set a new one.
        if self.group.get("lr") is self.scaled:
            self.group["lr"] = self.own


@dataclass(slots=True)
class _ScaledTensor:
    """A rate that is kept in a tensor: `copy` holds the user's value, `version` the state of `rate` after scaling."""

    rate: Tensor
    copy: Tensor
    version: int

    def restore(self) -> None:
        if self.rate._version == self.version:
            self.rate.copy_(self.copy)


class LrBackoff:
    """Scales the rates of one optimizer between `scale_rates` and `restore_rates`; a scale of 1 touches nothing."""

    def __init__(self) -> None:
        self._scaled: list[_ScaledRate | _ScaledTensor] = []
        self._copies: dict[int, Tensor] = {}
        self._in_closure = False

    @property
    def stranded(self) -> bool:
        """True when scaled rates stand in the parameter groups although no step is underway: `step()` has raised.

        Asked where a forward begins; a forward inside a step is its closure's, as Lightning's are.
        """
        return bool(self._scaled) and not self._in_closure

    def watch_closure(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments of `step()` with a closure that is known to run inside it; None when there is none to watch."""
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
        """Multiply each group's rate by `scale` in (0, 1]; groups without a rate of their own are left alone."""
        self.restore_rates()  # of a step() that raised: its post-hook never ran
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
        # A capturable optimizer's graph reads this very tensor: write in place, and never ask its value.
        if any(isinstance(each, _ScaledTensor) and each.rate is rate for each in self._scaled):
            return  # one tensor shared by several groups
        copy = self._copies.get(index)
        if copy is None or copy.shape != rate.shape or copy.device != rate.device or copy.dtype != rate.dtype:
            copy = self._copies[index] = torch.empty_like(rate)
        copy.copy_(rate)
        rate.mul_(scale)
        self._scaled.append(_ScaledTensor(rate, copy, rate._version))

    @torch.no_grad()
    def restore_rates(self) -> None:
        """Put every rate back, bit for bit, except where the user has set a new one since."""
        while self._scaled:
            self._scaled.pop().restore()


def largest_rate(optimizer: Optimizer) -> float | Tensor | None:
    """The largest rate over the groups as the schedule set it; a tensor, not read here, where one lives on a device."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    for rate in rates:
        if isinstance(rate, Tensor) and rate.device.type != "cpu":
            return rate
    known = [float(rate) for rate in rates if isinstance(rate, (int, float, Tensor))]
    return max(known) if known else None


def rate_sized_steps(optimizer: Optimizer) -> bool:
    """Whether a step moves each weight by about the learning rate, whatever the gradient's size: Adam and its kin.

    Told by the names of its classes, since most of them are other people's (AdamW8bit, FusedAdam, Lion, ...); of an
    optimizer that wraps another in `optim`, as ZeroRedundancyOptimizer does, by the one within.
    """
    inner = getattr(optimizer, "optim", None)
    classes = type(inner if isinstance(inner, Optimizer) else optimizer).__mro__
    return any(kin in each.__name__.lower() for each in classes for kin in RATE_SIZED)
