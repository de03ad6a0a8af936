"""The origin of states in the graph of gradients: from which earlier outputs an input was computed."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from torch import Tensor
from torch.autograd.graph import Node

MAX_NODES = 2000
"""Operations between two blocks that are followed."""
K = TypeVar("K")


class Lineage(Generic[K]):
    """The outputs of one forward, each with a key, and the inputs that were computed from them.

    It reads the graph that autograd records anyway, and no value. Without gradients nothing is known.
    """

    def __init__(self) -> None:
        self._keys: dict[Node, set[K]] = {}
        self._latest: list[tuple[K, Tensor]] = []

    def note_output(self, key: K, output: Tensor) -> None:
        """Remember `output` under `key`."""
        self._latest.append((key, output))

    def sources(self, state: Tensor) -> frozenset[K]:
        """Return the keys of the nearest outputs from which `state` was computed."""
        self._settle()
        if state.grad_fn is None or not self._keys:
            return frozenset()
        found: set[K] = set()
        seen, waiting = {state.grad_fn}, deque([state.grad_fn])
        while waiting and len(seen) <= MAX_NODES:
            node = waiting.popleft()
            if node in self._keys:
                found |= self._keys[node]
                continue
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return frozenset(found)

    def _settle(self) -> None:
        """Replace the latest outputs by their nodes. A reentrant checkpoint sets those after its block has returned."""
        for key, output in self._latest:
            if output.grad_fn is not None:
                self._keys.setdefault(output.grad_fn, set()).add(key)
        self._latest.clear()
