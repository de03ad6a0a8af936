"""Gradient clipping: a fixed norm in every arm, and adaptive rules of other authors beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

GradientRule = Callable[[Sequence[nn.Parameter], Tensor], None]
"""Called between backward and step with the parameters and the total norm of their gradients, 0-d."""


def gradient_rule(arm: str, clip: float) -> GradientRule:
    """Build the rule of an arm: clipping at `clip`, after the rule of the arm."""
    extra = ZClip() if arm == "zclip" else AdaGC() if arm == "adagc" else None

    def apply(parameters: Sequence[nn.Parameter], norm: Tensor) -> None:
        if extra is not None:
            norm = extra(parameters, norm)
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)

    return apply


class ZClip:
    """ZClip: scales down gradients whose norm is more than 2.5 standard deviations above its running mean.

    Source: arXiv 2504.02507, with z 2.5, decay 0.97, 25 steps of warm-up, and the reciprocal rule.
    """

    THRESHOLD, DECAY, WARMUP = 2.5, 0.97, 25

    def __init__(self) -> None:
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def __call__(self, parameters: Sequence[nn.Parameter], norm: Tensor) -> Tensor:
        value = norm.item()
        if len(self._first) < self.WARMUP:
            self._first.append(value)
            values = torch.tensor(self._first, dtype=torch.float64)
            self._mean, self._variance = values.mean().item(), values.var(correction=0).item()
            return norm
        deviation = math.sqrt(self._variance) + 1e-12
        z = (value - self._mean) / deviation
        kept = self._mean + self.THRESHOLD**2 / z * deviation if z > self.THRESHOLD else value
        if kept < value:
            nn.utils.clip_grads_with_norm_(parameters, kept, norm)
        self._variance = self.DECAY * self._variance + (1 - self.DECAY) * (kept - self._mean) ** 2
        self._mean = self.DECAY * self._mean + (1 - self.DECAY) * kept
        return norm.new_tensor(min(kept, value))


class AdaGC:
    """AdaGC: bounds each tensor's gradient by 1.05 times the running mean of its own norm.

    Source: arXiv 2502.11034, with decay 0.98, after a warm-up of fixed clipping.
    """

    RATIO, DECAY, WARMUP = 1.05, 0.98, 50

    def __init__(self) -> None:
        self._means: list[float] = []
        self._seen = 0

    def __call__(self, parameters: Sequence[nn.Parameter], norm: Tensor) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        factor = 1.0 if self._seen >= self.WARMUP else min(1.0, 1.0 / (norm.item() + 1e-6))
        norms = [gradient.norm().item() * factor for gradient in gradients]
        self._seen += 1
        if not self._means:
            self._means = norms
        if self._seen <= self.WARMUP:
            self._means = [min(mean, value) for mean, value in zip(self._means, norms, strict=True)]
            return norm
        for index, (gradient, value) in enumerate(zip(gradients, norms, strict=True)):
            held = min(value, self.RATIO * self._means[index])
            if held < value:
                gradient.mul_(held / value)
            self._means[index] = self.DECAY * self._means[index] + (1 - self.DECAY) * held
        return nn.utils.get_total_norm(gradients)
