"""Search for the GradScaler that scales the loss of an optimizer: the KSS gradient must have the same scale."""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any

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
    found: Any = next((each for each in gc.get_objects() if _has_unscaled(each, optimizer)), None)
    scaler: torch.amp.GradScaler | None = found
    return scaler


def _has_unscaled(candidate: object, optimizer: Optimizer) -> bool:
    if not issubclass(type(candidate), torch.amp.GradScaler):  # isinstance reads __class__, which runs code of proxies
        return False
    scaler: Any = candidate
    return scaler.is_enabled() and id(optimizer) in scaler._per_optimizer_states
