"""Kinds of forwards: those that are recomputed, run inside a checkpoint, or have no values."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def recomputing() -> bool:
    """Return True during a backward pass in this thread.

    A forward inside it is a recomputation by activation checkpointing.
    """
    return torch._C._current_graph_task_id() != -1


def in_checkpoint() -> bool:
    """Return True inside the forward of an autograd function, such as a reentrant checkpoint, that is differentiated.

    It runs without gradients, although its arguments have some. The state of a block inside may have none.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        context = frame.f_locals.get("ctx") if frame.f_code.co_name == "forward" else None
        if isinstance(context, FunctionCtx) and any(getattr(context, "needs_input_grad", ())):
            return True
        frame = frame.f_back
    return False


def has_values(state: Tensor) -> bool:
    """Return False for a meta or fake tensor, which has a shape alone."""
    return not (state.is_meta or isinstance(state, torch._subclasses.fake_tensor.FakeTensor))
