"""Search for the GradScaler that scales the loss of an optimizer: the KSS gradient must have the same scale."""

from __future__ import annotations

import gc
import sys
from types import FrameType

import torch
from torch.optim import Optimizer

_MAX_FRAMES = 32


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
