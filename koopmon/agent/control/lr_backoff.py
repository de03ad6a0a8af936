"""Learning-rate back-off: scales each parameter group's rate during `step()`, and restores the user's value after it.

Schedulers see only the values that they set, so that any of them composes: effective rate = schedule x scale, exactly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from koopmon.agent.control.action import ControlAction, RequestRefusedError, Target, Update
from koopmon.agent.control.state import ControlState
from koopmon.config import LimitsConfig
from koopmon.plugins import Selection
from koopmon.wire.messages import Applied, Command

RATE_SIZED = ("adam", "lion", "rmsprop")
"""Parts of the names of optimizers that divide the gradient by its own size, or take its sign."""
MIN_EFFECTIVE_SCALE = 0.001
"""Lower bound on the scale under a cap on the peak rate. `[limits] min_lr_scale` bounds the commanded scale only."""


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


class LrBackoff(ControlAction):
    """Scales the rates of an optimizer during each update. Its strength is the scale; a scale of 1 changes nothing.

    A cap on the peak rate is in the parameters: `max_rate`, the step `capped_from` at which the first cap was set, and
    the warm-up of `warmup_steps` from step `warmup_from` on.
    """

    kind = "set_lr_scale"
    neutral = 1.0
    lasting = True

    def __init__(self, limits: LimitsConfig) -> None:
        self._min_scale = limits.min_lr_scale
        self._scaled: list[_ScaledRate | _ScaledTensor] = []
        self._copies: dict[int, Tensor] = {}
        self._in_closure = False
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._peak = (-1, 0.0)
        """First step under the cap and the largest scheduled rate since. One tuple: the I/O thread reads it."""

    def inspect(self, model: nn.Module, optimizer: Optimizer, selection: Selection) -> None:
        self._optimizer = weakref.ref(optimizer)

    def target(self, request: Command | Applied, state: ControlState, step: int) -> Target:
        assert request.lr_scale is not None
        scale, parameters, details = max(request.lr_scale, self._min_scale), dict(self.parameters(state)), []
        if scale > request.lr_scale:
            details.append(f"lr_scale capped at {scale}")
        if request.max_rate is not None:
            self._check_rates()
            cap = min(request.max_rate, parameters.get("max_rate", request.max_rate))
            if cap < request.max_rate:
                details.append(f"max_rate stays at {cap:g}, since a cap is only lowered")
            parameters = {
                "max_rate": cap,
                "capped_from": parameters.get("capped_from", step),
                "warmup_from": step,
                "warmup_steps": request.warmup_steps if isinstance(request, Command) else 0,
            }
        acts = scale != self.neutral or request.max_rate is not None
        return Target(scale, parameters, ", ".join(details), acts)

    def _check_rates(self) -> None:
        """Raise RequestRefusedError if the peak of the rates cannot be followed."""
        optimizer = self._optimizer()
        rate = None if optimizer is None else largest_rate(optimizer)
        if not isinstance(rate, float):
            where = "has no learning rate" if rate is None else "has its learning rate on a device"
            raise RequestRefusedError(f"max_rate is refused: the optimizer {where}")

    def released(self, state: ControlState) -> Target:
        return Target(self.neutral, acts=False)

    def applied(self, state: ControlState, step: int) -> Mapping[str, Any]:
        return {"lr_scale": self.strength(state, step), "max_rate": self.parameters(state).get("max_rate")}

    def training(self, state: ControlState, step: int) -> Mapping[str, float]:
        return {"lr_scale": self.effective(state, step)}

    def strength(self, state: ControlState, step: int) -> float:
        part = state.actions.get(self.kind)
        return self.neutral if part is None else part.ramp.geometric(step)

    def effective(self, state: ControlState, step: int) -> float:
        scale, cap = self.strength(state, step), self.parameters(state)
        if not cap:
            return scale
        first, peak = self._peak
        warm = 1.0
        if cap["warmup_steps"] > 0:
            warm = min(1.0, (step - cap["warmup_from"] + 1) / cap["warmup_steps"])
        if first == cap["capped_from"] and peak > cap["max_rate"]:
            warm *= cap["max_rate"] / peak
        return max(min(scale, warm), MIN_EFFECTIVE_SCALE)

    def apply(self, state: ControlState, step: int, update: Update) -> None:
        self.restore_rates()  # if a step() raised, its post-hook never ran
        if cap := self.parameters(state):
            self._follow_peak(int(cap["capped_from"]), largest_rate(update.optimizer))
        self.scale_rates(update.optimizer, self.effective(state, step))
        if self._scaled:
            self._watch_closure(update)

    def _follow_peak(self, capped_from: int, rate: float | Tensor | None) -> None:
        first, peak = self._peak
        known = peak if first == capped_from else 0.0
        if rate is not None and float(rate) > known:
            known = float(rate)
        self._peak = capped_from, known

    def revert(self) -> None:
        self.restore_rates()

    def on_forward(self) -> None:
        # A rate that is scaled outside of an update was left by a step() that raised. Schedulers must not see it. A
        # forward inside an update belongs to its closure, as in Lightning.
        if self._scaled and not self._in_closure:
            self.restore_rates()

    def _watch_closure(self, update: Update) -> None:
        """Wrap the closure of `step()`, if any, to recognise the forwards that run inside it."""
        if callable(update.kwargs.get("closure")):
            update.kwargs = {**update.kwargs, "closure": self._watched(update.kwargs["closure"])}
        elif len(update.args) > 1 and callable(update.args[1]):
            update.args = (update.args[0], self._watched(update.args[1]), *update.args[2:])

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
