"""The candidate stacks of one model that are tapped inside compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from koopmon.agent.capture.graph_taps import BlockTap, Copied, GraphTaps, supported
from koopmon.api import ArchitectureAdapter, Point, Stack

INSIDE_A_GRAPH = (
    "blocks inside a graph that was compiled before show nothing: attach before the first forward pass, or"
    " compile them one by one, block = torch.compile(block)"
    if supported()
    else "blocks inside one compiled graph show nothing: compile them one by one, block = torch.compile(block)"
)
MAX_GRAPH_STACKS = 4
"""Candidate stacks that are tapped inside a compiled graph. A graph keeps its taps also if another stack is kept."""


class CompiledStacks:
    """The graph taps of each candidate stack, by its name. `num_rows` returns the number of tokens that they copy."""

    def __init__(self, candidates: Sequence[Stack], num_rows: Callable[[], int]) -> None:
        self._taps = {stack.name: GraphTaps(stack, num_rows) for stack in _outermost(candidates)}

    @property
    def traced(self) -> bool:
        """True if a graph holds the taps of any stack."""
        for taps in self._taps.values():  # noqa: SIM110 - each step asks
            if taps.traced:
                return True
        return False

    def holds(self, stack: Stack) -> bool:
        """Return True if a graph holds the taps of `stack`."""
        return stack.name in self._taps and self._taps[stack.name].traced

    def tap(self, stack: Stack, point: Point) -> BlockTap | None:
        """Return the tap of a block of `stack`; None if it is not tapped inside a graph."""
        taps = self._taps.get(stack.name)
        return None if taps is None else taps.taps[stack.points.index(point)]

    def close(self, name: str) -> None:
        """Put no taps of the stack into further graphs. A graph keeps those that it has."""
        if name in self._taps:
            self._taps[name].close()

    def read(self) -> list[tuple[GraphTaps, list[Copied]]]:
        """Return what the last forward has left, for each stack that was called. Waits for the device."""
        return [(taps, copied) for taps in self._taps.values() if (copied := taps.read()) is not None]

    def was_called(self, kept: Stack) -> bool:
        """Return True if the last forward has left states of `kept`."""
        return kept.name in self._taps and self._taps[kept.name].read() is not None

    def states(self, kept: Stack, adapter: ArchitectureAdapter) -> list[Tensor] | None:
        """Return the states of the last forward at every point of `kept`; None if they are absent or incomplete."""
        taps = self._taps.get(kept.name)
        copied = None if taps is None else taps.read()
        return None if taps is None or copied is None else taps.states(copied, adapter, kept)

    def arm(self, kept: Stack, choose: Callable[[int, int], Tensor]) -> None:
        """Copy the states of `kept` in the next forward."""
        self._taps[kept.name].arm(choose)


def _outermost(candidates: Sequence[Stack]) -> list[Stack]:
    """Return the first stacks that do not lie inside a block of another one; none if no graph can be tapped."""
    found: list[Stack] = []
    for stack in candidates if supported() else ():
        first = stack.points[0].module
        blocks = [point.module for each in found for point in each.points]
        if len(found) < MAX_GRAPH_STACKS and not any(first is each for block in blocks for each in block.modules()):
            found.append(stack)
    return found
