"""Search for the GradScaler that scales the loss of an optimizer.

The KSS gradient must have the same scale, and the reported loss none.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import FrameType

import torch
from torch.optim import Optimizer

_MAX_FRAMES = 32


class ScalerFinder:
    """Finds the GradScaler of a training and remembers it."""

    def __init__(self) -> None:
        self.known: Callable[[], torch.amp.GradScaler | None] = lambda: None
        """Returns the scaler that was found last, while it exists."""
        self._scanned = False

    def find(self, optimizer: Optimizer, *, scan: bool = True) -> torch.amp.GradScaler | None:
        """Return the GradScaler, if any, that scales the loss of `optimizer`.

        Call it from inside the optimizer's step(). A scaler that does not call it is searched among all live objects,
        if `scan` allows it. That is slow, and done once in a training.
        """
        scaler = calling_scaler()
        if scaler is None and scan and not self._scanned:
            self._scanned = True
            scaler = unscaling_scaler(optimizer)
        if scaler is not None:
            self.known = weakref.ref(scaler)
        return self.known()


def calling_scaler() -> torch.amp.GradScaler | None:
    """Return the enabled GradScaler whose step() is on the call stack; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MAX_FRAMES):
        if frame is None:
            return None
        if frame.f_code.co_name in ("step", "_maybe_opt_step"):
            caller = frame.f_locals.get("self")
            if isinstance(caller, torch.amp.GradScaler) and caller.is_enabled():
                return caller
        frame = frame.f_back
    return None


def unscaling_scaler(optimizer: Optimizer) -> torch.amp.GradScaler | None:
    """Return a live GradScaler that has unscaled the gradients of `optimizer` in this step; None if there is none."""
    for each in gc.get_objects():
        # isinstance() reads `__class__`, which runs code of proxies. type() does not.
        if issubclass(type(each), torch.amp.GradScaler):
            scaler: torch.amp.GradScaler = each
            if scaler.is_enabled() and id(optimizer) in scaler._per_optimizer_states:
                return scaler
    return None
