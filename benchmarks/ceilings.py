"""Ceilings of KSS by projection in a training's own process, as the agent holds them.

The factors are those of the policy. The writing weights are known by their name; the agent proves them.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from koopmon.agent.control.ceilings import HeldWeight, hold

WRITES = "project"
"""Name of the modules that write into the stream: the output of the attention and the second matrix of the MLP."""


def writing_weights(block: nn.Module) -> list[Tensor]:
    """Return the weights and the biases with which a block writes into the stream. Raises ValueError without any."""
    found = [
        parameter
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == WRITES
        for parameter in module.parameters(recurse=False)
    ]
    if not found:
        raise ValueError(f"{type(block).__name__}: no module named {WRITES}")
    return found


class Ceilings:
    """Ceilings on what `blocks` write."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._weights = [writing_weights(block) for block in blocks]
        self._held: list[HeldWeight] = []
        self.num_held = 0
        """Number of steps with ceilings."""

    def set(self, factors: Mapping[int, float]) -> None:
        """Hold the writing weights of each layer at its factor times their present norm. An empty mapping ends it."""
        self._held = [
            HeldWeight(WRITES, weakref.ref(weight), factor * float(weight.detach().norm()))
            for layer, factor in factors.items()
            for weight in self._weights[layer]
        ]

    def hold(self) -> None:
        """Scale down the weights above their ceilings, after an update."""
        self.num_held += bool(self._held)
        hold(self._held)
