"""The size of gradients relative to the second moments of Adam-like optimizers, before the update.

In a steady training a gradient has about the size of the square root of its second moment, and the result is about 1.
It is far above 1 where the second moment has not seen such gradients yet, as before the spikes of arXiv 2304.13013.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from koopmon.agent.capture.scalar import Scalar, divided, on_host, stacked
from koopmon.no_gradients import without_gradients

SECOND_MOMENT = "exp_avg_sq"
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class UpdateRms:
    """RMS over parameters of ||g|| / ||sqrt(v)||, with bias-corrected second moments v.

    Of a sharded parameter this rank's part counts. Complex parameters do not count. No gradient or moment is copied.
    """

    def __init__(self) -> None:
        self._squares: list[float] = []
        """Squares of parameters on the CPU. A parameter that does not count has NaN."""
        self._on_devices: list[Tensor] = []
        """Squares of parameters on accelerators, 1-d."""

    @without_gradients
    def add(self, optimizer: Optimizer, norms: Mapping[int, Scalar] = MappingProxyType({})) -> None:
        """Add the parameters that `optimizer` is about to update. Those without a second moment do not count.

        `norms` are norms of gradients that are known already, float32, by the id of the parameter.
        """
        scale = getattr(optimizer, "grad_scale", None)  # a GradScaler left it to a fused optimizer
        for group in optimizer.param_groups:
            parameters, gradients, moments = _pairs(optimizer, group)
            if not gradients or (gradients[0].is_cuda and torch.cuda.is_current_stream_capturing()):
                continue
            lengths: list[Any] = [norms[each] for each in parameters if each in norms]
            if len(lengths) < len(gradients):
                lengths = on_host(torch._foreach_norm(gradients, 2.0, dtype=torch.float32))
            factor: Any = divided(1.0, scale) ** 2 * _correction(optimizer, group)
            if not gradients[0].is_cpu:
                sizes, usual = stacked(lengths).square_().mul_(factor), torch.stack(_sums(moments))
                self._on_devices.append(torch.where(usual > 0, sizes.div_(usual), torch.nan))
            elif not isinstance(factor, Tensor):  # else it lies on an accelerator, for which nothing waits
                totals: list[Any] = on_host(_sums(moments))
                pairs = zip(lengths, totals, strict=True)
                self._squares += [factor * length**2 / total if total > 0.0 else math.nan for length, total in pairs]

    @without_gradients
    def end(self) -> Scalar | None:
        """Return the result; None without second moments. Forgets them."""
        squares, on_devices, self._squares, self._on_devices = self._squares, self._on_devices, [], []
        if not squares and not on_devices:
            return None
        if on_devices:
            place = on_devices[0].device
            mean: Tensor = torch.cat([torch.as_tensor(each, device=place) for each in (*on_devices, squares)]).nanmean()
            return mean.sqrt_()
        counted = [each for each in squares if each >= 0.0]  # no NaN
        return math.sqrt(sum(counted) / len(counted)) if counted else math.nan


def _pairs(optimizer: Optimizer, group: dict[str, Any]) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Return the ids of a group's parameters, their gradients and their second moments, all on one device."""
    device = None
    ids: list[int] = []
    gradients: list[Tensor] = []
    moments: list[Tensor] = []
    for parameter in group["params"]:
        gradient, moment = parameter.grad, optimizer.state.get(parameter, _NOTHING).get(SECOND_MOMENT)
        if gradient is None or not isinstance(moment, Tensor) or gradient.is_sparse or gradient.is_complex():
            continue
        if not type(gradient) is type(moment) is Tensor:
            gradient, moment = _local(gradient), _local(moment)
        device = device or gradient.device
        if gradient.shape == moment.shape and gradient.numel() and gradient.device == moment.device == device:
            ids.append(id(parameter))
            gradients.append(gradient)
            moments.append(moment)
    return ids, gradients, moments


def _sums(moments: list[Tensor]) -> list[Tensor]:
    """Return the sum of each second moment, float32. None of them is negative."""
    if moments[0].device.type == "cpu":
        return [each.sum(dtype=torch.float32) for each in moments]  # on the CPU a norm of order 1 takes twice as long
    return list(torch._foreach_norm(moments, 1.0, dtype=torch.float32))


def _correction(optimizer: Optimizer, group: dict[str, Any]) -> Any:
    """Return 1 - beta2 ** step, a number or a tensor on the device of the step; 1 where either is unknown."""
    steps = (optimizer.state.get(each, {}).get("step") for each in group["params"])
    step = next((each for each in steps if each is not None), group.get("step"))
    betas = group.get("betas")
    if isinstance(step, Tensor) and step.device.type == "cpu":
        step = float(step)
    if step is None or not isinstance(betas, (tuple, list)) or len(betas) < 2:
        return 1.0
    return 1.0 - betas[1] ** step


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
