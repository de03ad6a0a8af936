"""The log-partition of a model's output: log(sum(exp(logits))), which grows when output logits drift."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from koopmon.no_gradients import without_gradients

NUM_TOKENS = 64
"""Tokens that count. Their logits become float32: 64 of a vocabulary of 150,000 take 37 MiB for a moment."""


def vocabularies(model: nn.Module) -> frozenset[int]:
    """Return the sizes of the model's embeddings. An output of such a width holds logits."""
    return frozenset(each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding))


@without_gradients
def log_partition(output: Any, sizes: Collection[int]) -> Tensor | None:
    """Compute the mean log-partition of evenly spaced tokens of a model's output, in nats; 0-d, on its device.

    Logits are the item or attribute `logits`, or the first tensor if it is (B, T, V) with V among `sizes`. None for
    another output, and for logits without gradients, in parts on several ranks, or not contiguous.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        logits = first if isinstance(first, Tensor) and first.dim() == 3 and first.shape[-1] in sizes else None
    if logits is None or logits.dim() < 2 or not logits.numel() or not logits.is_floating_point():
        return None
    if not logits.requires_grad or hasattr(logits, "to_local") or not logits.is_contiguous():
        return None
    rows = logits.detach().view(-1, logits.shape[-1])
    mean: Tensor = rows[:: max(1, len(rows) // NUM_TOKENS)][:NUM_TOKENS].float().logsumexp(-1).mean()
    return mean
