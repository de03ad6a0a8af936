"""Baseline statistics of other monitors: one number per step each, from the same forward pass as the states.

- kurtosis: of the residual stream, the largest of the layers (outlier features).
- max_attention_logit: before the softmax, over all layers, heads and causal pairs.
- query_key_entropy: of the attention distribution, the smallest of the layers.
- alignment: after arXiv 2510.04202. For every weight matrix of the blocks, p is the share of its input tokens on one
  side of its leading right singular vector. The value is |2p - 1|: 0 for mixed signs, 1 for collapsed ones; the mean
  over matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import Attention, Decoder

POWER_STEPS = 4


class Probes:
    """Reads a `Decoder` between `start` and `stop`. The singular vector of each matrix starts the next iteration."""

    def __init__(self, model: Decoder) -> None:
        self._attentions = [module for module in model.modules() if isinstance(module, Attention)]
        self._linears = [
            module for block in model.blocks for module in block.modules() if isinstance(module, nn.Linear)
        ]
        generator = torch.Generator().manual_seed(0)
        self._leading = [torch.randn(linear.in_features, generator=generator) for linear in self._linears]
        self._handles: list[Any] = []
        self._logits: list[float] = []
        self._entropies: list[float] = []
        self._alignments: list[float] = []

    def start(self) -> None:
        self._logits, self._entropies, self._alignments = [], [], []
        for attention in self._attentions:
            heads = attention.num_heads
            hook = lambda _, __, output, heads=heads: self._attend(output, heads)  # noqa: E731
            self._handles.append(attention.qkv.register_forward_hook(hook))
        for index, linear in enumerate(self._linears):
            seen = lambda _, args, index=index: self._align(args[0], index)  # noqa: E731
            self._handles.append(linear.register_forward_pre_hook(seen))

    def stop(self, states: list[Tensor]) -> dict[str, float]:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        found = {
            "kurtosis": max(_kurtosis(state) for state in states),
            "alignment": sum(self._alignments) / len(self._alignments),
        }
        if self._attentions:
            found |= {"max_attention_logit": max(self._logits), "query_key_entropy": min(self._entropies)}
        return found

    @torch.no_grad()
    def _attend(self, output: Tensor, num_heads: int) -> None:
        q, k, _ = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in output.chunk(3, dim=-1))  # type: ignore[no-untyped-call]
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
        self._logits.append(logits[..., ~later].max().item())
        shares = logits.softmax(-1)
        self._entropies.append(torch.special.entr(shares).sum(-1).mean().item())

    @torch.no_grad()
    def _align(self, x: Tensor, index: int) -> None:
        weight, v = self._linears[index].weight, self._leading[index]
        for _ in range(POWER_STEPS):
            v = nn.functional.normalize(weight.T @ (weight @ v), dim=0)
        self._leading[index] = v if bool(v.isfinite().all()) else self._leading[index]
        positive = (x.flatten(0, -2) @ v > 0).float().mean()
        self._alignments.append((2 * positive - 1).abs().item())


def _kurtosis(state: Tensor) -> float:
    flat = state.flatten(0, -2).double()
    centred = flat - flat.mean(-1, keepdim=True)
    second = centred.square().mean(-1)
    return float((centred.pow(4).mean(-1) / second.square().clamp_min(1e-30)).mean())
