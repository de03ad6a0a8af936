"""Optimizers of the proving ground: AdamW, Muon beside AdamW, and StableAdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer

OptimizerName = Literal["adamw", "muon", "stable_adamw"]
"""Names of optimizers.

muon: Muon for the matrices of the blocks and AdamW for all other parameters, at one rate: Muon's updates are scaled to
the root mean square of AdamW's (arXiv 2502.16982). stable_adamw: AdamW with update clipping (arXiv 2304.13013).
"""
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
BETA1 = 0.9


def build(
    name: OptimizerName, model: nn.Module, *, lr: float, weight_decay: float, beta2: float, apart: str = ""
) -> list[Optimizer]:
    """Build the optimizers of a model. Parameters whose name contains `apart` have a group of their own, the last."""
    named = list(model.named_parameters())
    chosen = [weight for path, weight in named if apart and apart in path]
    others = [(path, weight) for path, weight in named if not (apart and apart in path)]
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    hidden: list[Optimizer] = []
    if name == "muon":
        from torch.optim import Muon  # since torch 2.9

        matrices = [weight for path, weight in others if path.startswith("blocks.") and weight.dim() == 2]
        others = [(path, weight) for path, weight in others if not (path.startswith("blocks.") and weight.dim() == 2)]
        hidden.append(Muon(matrices, **settings, adjust_lr_fn="match_rms_adamw"))
    groups = [group for group in ([weight for _, weight in others], chosen) if group]
    settings |= {"betas": (BETA1, beta2)}
    if name == "stable_adamw":
        from pytorch_optimizer import StableAdamW

        adam: Optimizer = StableAdamW([{"params": group} for group in groups], **settings)
    else:
        adam = AdamW([{"params": group} for group in groups], **settings)
    return [*hidden, adam]


def set_rate(optimizers: Sequence[Optimizer], rate: float, apart: float = 1.0) -> None:
    """Set the rate of every group to `rate`, and that of the parameters apart to `apart` times as much."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    for group in optimizers[-1].param_groups[1:]:
        group["lr"] = rate * apart
