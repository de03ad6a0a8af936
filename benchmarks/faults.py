"""Injected faults of a training besides its learning rate."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Fault = Literal["", "bad_batch", "optimizer_state", "precision", "no_warmup"]
FAULTS: tuple[Fault, ...] = get_args(Fault)[1:]
BAD_BATCHES = 5
MANTISSA_BITS = 2
"""Mantissa bits of the coarse arithmetic, as in fp8 E5M2."""


def strike(fault: Fault, since: int, model: nn.Module, optimizer: Optimizer, labels: Tensor) -> None:
    """Apply `fault`, `since` steps after its start (negative before it).

    bad_batch: all labels of 5 batches are equal. optimizer_state: once, the second moments of Adam lose their upper
    99%, as from a damaged checkpoint. precision: from now on, the weights keep 2 bits of mantissa. no_warmup: see
    `training.warmed`.
    """
    if fault == "bad_batch" and 0 <= since < BAD_BATCHES:
        labels.fill_(1)
    elif fault == "optimizer_state" and since == 0:
        for state in optimizer.state.values():
            state["exp_avg_sq"].mul_(0.01)
    elif fault == "precision" and since >= 0:
        with torch.no_grad():
            for parameter in model.parameters():
                mantissa, exponent = torch.frexp(parameter)
                steps = 2.0 ** (MANTISSA_BITS + 1)
                parameter.copy_(torch.ldexp((mantissa * steps).round() / steps, exponent))
