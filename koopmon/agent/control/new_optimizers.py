"""Notice of optimizers that step in this process and are not attached, by one hook for all optimizers."""

from __future__ import annotations

import sys
import weakref
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from koopmon.agent.control.scaled_view import is_view
from koopmon.agent.control.step_clock import stepping_optimizers


class StepListener(Protocol):
    """Receiver of the steps of all optimizers."""

    def on_any_step(self, optimizer: Optimizer) -> None:
        """Handle the end of a step of any optimizer of the process, attached or not. It must not raise."""


_listeners: list[weakref.ref[StepListener]] = []
"""Each once. A plain list: each step of each optimizer walks through it."""


def listen(listener: StepListener) -> None:
    """Call `listener` after each step of any optimizer, while it lives."""
    ignore(listener)
    _listeners.append(weakref.ref(listener))
    prepare()


def ignore(listener: StepListener) -> None:
    """Call `listener` no more."""
    _listeners[:] = [each for each in _listeners if each() not in (None, listener)]


def prepare() -> None:
    """Register the hook, unless an optimizer steps now: torch iterates over its hooks then."""
    hooks = vars(sys.modules[Optimizer.__module__])["_global_optimizer_post_hooks"]
    if _after_step not in hooks.values() and next(stepping_optimizers(), None) is None:
        register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling() and not is_view(optimizer):
        for reference in tuple(_listeners):
            if (each := reference()) is not None:
                each.on_any_step(optimizer)
