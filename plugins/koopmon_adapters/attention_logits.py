"""The largest attention logit of a module, from what its forward has kept for the backward pass.

Fused attention never forms the logits, and positions, norms and groups of heads are the module's own. The graph of the
output holds the queries and keys as they were multiplied, and fused kernels keep log(sum(exp(logits))) of each query.
That number lies between the largest logit of the query and the same plus log(T), for T keys.

Shapes: B sequences and heads together, T queries, S keys, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

MAX_NODES = 48
"""Nodes of the graph that are visited: an output projection has about ten."""
MAX_FACTORS = 12
"""Nodes between the logits and their softmax."""
NUM_QUERIES = 64
"""Queries of each sequence and head that count where the logits are formed and then forgotten."""
SOFTMAX = ("SoftmaxBackward0", "SafeSoftmaxBackward0")
_PASSED = {
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Unsqueeze", "Squeeze", "Slice", "Clone", "ToCopy", "Add", "MaskedFill", "Where")
} | {"ReshapeAliasBackward0", "SqueezeBackward1", "SelectBackward0"}
"""Nodes that keep the logits of visible keys: casts, changes of shape, masks."""


def largest_logit(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor | None:
    """Read the largest log(sum(exp(logits))) over the queries of an attention module.

    Fused attention counts all queries, other code NUM_QUERIES of each sequence and head, and without biases that it
    adds to the logits. None where the graph has neither, as under activation checkpointing or in a compiled block.
    """
    parts = output if isinstance(output, (tuple, list)) else (output,)
    starts = [part.grad_fn for part in parts if isinstance(part, Tensor) and part.grad_fn is not None]
    for node in _nodes(starts[:1]):
        fused = _saved(node, "logsumexp", "log_sumexp")
        if fused is not None and (query := _saved(node, "query")) is not None:
            return _largest(fused[..., : query.shape[-2]])  # some kernels pad the queries
        if node.name() in SOFTMAX:
            return _formed(node)
    return None


def _nodes(starts: list[Any]) -> Iterator[Any]:
    """Yield the nodes of a graph, the nearest first."""
    found = dict.fromkeys(starts)
    waiting = list(starts)
    while waiting and len(found) < MAX_NODES:
        node = waiting.pop(0)
        yield node
        new = [each for each, _ in node.next_functions if each is not None and each not in found]
        found.update(dict.fromkeys(new))
        waiting += new


def _saved(node: Any, *names: str) -> Tensor | None:
    """Return the first of these saved tensors; None if a hook has packed it, as activation checkpointing does."""
    for name in names:
        kept = getattr(node, f"_raw_saved_{name}", None)
        if kept is not None and getattr(kept, "unpack_hook", kept) is None:
            value = getattr(node, f"_saved_{name}")
            return value if isinstance(value, Tensor) and not hasattr(value, "to_local") else None
    return None


def _formed(softmax: Any) -> Tensor | None:
    """Compute the result from a softmax of products of queries and keys: of each query's likeliest key."""
    node, factor, shares = softmax, 1.0, _saved(softmax, "result")
    for _ in range(MAX_FACTORS):
        node = next((each for each, _ in node.next_functions if each is not None), None)
        if node is None or shares is None:
            return None
        name = node.name()
        if name in ("MulBackward0", "DivBackward0"):
            other = _saved(node, "other")
            if other is None or other.dim() or other.device.type != "cpu":
                return None
            factor = factor * other.item() if name == "MulBackward0" else factor / other.item()
        elif name in ("BmmBackward0", "BaddbmmBackward0"):
            queries, keys = _saved(node, "self", "batch1"), _saved(node, "mat2", "batch2")
            return None if queries is None or keys is None else _by_product(shares, queries, keys, factor)
        elif name not in _PASSED:
            return None
    return None


def _by_product(shares: Tensor, queries: Tensor, keys: Tensor, factor: float) -> Tensor | None:
    """`shares` is (..., T, S), `queries` (B, T, D), `keys` (B, D, S)."""
    shape = (len(queries), queries.shape[1], keys.shape[2])
    if (math.prod(shares.shape[:-2]), *shares.shape[-2:]) != shape:
        return None
    every = max(1, queries.shape[1] // NUM_QUERIES)
    share, likeliest = shares.reshape(shape)[:, ::every].max(-1)
    chosen = keys.transpose(1, 2).gather(1, likeliest.unsqueeze(-1).expand(-1, -1, keys.shape[1]))
    logits = (queries[:, ::every].float() * chosen.float()).sum(-1) * factor
    return _largest(logits - share.float().log())


def _largest(values: Tensor) -> Tensor:
    """Return the largest finite value. A query that sees no key has none."""
    return torch.where(values.isfinite(), values, -math.inf).amax()
