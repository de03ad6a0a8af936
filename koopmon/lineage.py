"""The origin of states: from which earlier outputs an input was computed, by the graph of gradients or by values."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

MAX_NODES = 2000
"""Operations between two blocks that are followed."""
MIN_CHANGE = 1e-6
"""Least change of direction by a block, relative to the state, that can be found in the next input: ten times the
rounding of float32."""
MIN_FOUND = 0.25
"""Least correlation of that change with the one between two inputs. By hand; unrelated states of 64 x 64 values have
0.02."""
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


class ValueLineage(Lineage[K]):
    """The same by values, for states from a compiled graph, of which no graph of gradients is known.

    An input was computed from the output of the block before if the change of that block is found in the change from
    its own input to this one. Both changes are taken orthogonally to that input. A block that changes nothing shows
    nothing, and blocks in parallel have equal inputs. It waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inputs: list[Tensor] = []
        """Those of the latest call."""
        self._outputs: list[tuple[K, Tensor, Tensor]] = []
        """Those of the latest call, each with an input of its shape."""
        self._has_returned = False

    def note_output(self, key: K, output: Tensor) -> None:
        """Remember `output` under `key`, and the input of its call."""
        if not self._has_returned:
            self._outputs = []
        self._has_returned = True
        self._outputs += [(key, state, output) for state in self._inputs if state.shape == output.shape][:1]

    def sources(self, state: Tensor) -> frozenset[K]:
        """Return the keys of the latest outputs whose change is found in `state`."""
        if self._has_returned:
            self._inputs, self._has_returned = [], False
        self._inputs.append(state)
        alike = [each for each in self._outputs if each[1].shape == state.shape]
        return frozenset(key for key, before, output in alike if _found(before, output, state))


@torch.no_grad()
def _found(before: Tensor, output: Tensor, state: Tensor) -> bool:
    """Return True if the change from `before` to `output` is found in that from `before` to `state`, all (..., D)."""
    # Row by row, because a normalisation between two blocks scales the rows.
    x = before.double()
    squares = x.square().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    changes = []
    for other in (output, state):
        y = other.double().to(x.device)
        changes.append(y - (x * y).sum(-1, keepdim=True) / squares * x)
    sizes = [change.norm() for change in changes]
    if not all(size > MIN_CHANGE * x.norm() for size in sizes):
        return False
    return bool((changes[0] * changes[1]).sum() > MIN_FOUND * sizes[0] * sizes[1])
