"""Calls of blocks in one forward, and the traversals of a stack that they form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from koopmon.api import Path, StackForm
from koopmon.observed_states import State
from koopmon.state_position import SUM

ADAPTERS: Path = ("the adapter's",)
"""Stands for the state that the adapter reads."""


@dataclass(slots=True, eq=False)
class Call:
    """One call of a block. `began` and `ended` are moments of the forward."""

    layer: int
    began: int
    entered: dict[Path, State]
    in_gradients: bool
    ended: int | None = None
    left: dict[Path, State] = field(default_factory=dict)
    updates: dict[tuple[Path, Path], Tensor] = field(default_factory=dict)
    """Per pair of states, (3,): the update's exponent, its relative size, the correlation of output and input."""
    on_host: dict[tuple[Path, Path], tuple[float, ...]] = field(default_factory=dict)
    sources: dict[Path, frozenset[tuple[int, Path]]] = field(default_factory=dict)
    """Per state at the entry, the outputs from which it was computed: (end of the call, path) of each."""
    steps: dict[Path, Tensor] = field(default_factory=dict)
    """Per state at the entry, the same three numbers as in `updates`, from the entry of the call before."""
    steps_on_host: dict[Path, tuple[float, ...]] = field(default_factory=dict)

    def takes_output_of(self, other: Call, pair: tuple[Path, Path]) -> bool:
        """Return True if the state that enters this call is the one that left `other`."""
        into, out = pair
        return other.left[out].equals(self.entered[into])

    def descends_from(self, other: Call, pair: tuple[Path, Path]) -> bool:
        """Return True if the state that enters this call was computed from the one that left `other`, of its shape."""
        into, out = pair
        alike = other.left[out].shape == self.entered[into].shape
        return alike and (self.takes_output_of(other, pair) or (other.ended, out) in self.sources[into])

    def follows_entry_of(self, other: Call, pair: tuple[Path, Path]) -> bool:
        """Return True if the state that enters this call was computed from any output of `other`, called just before.

        The states that enter both have one shape.
        """
        into = pair[0]
        return into in self.steps_on_host and any(end == other.ended for end, _ in self.sources[into])


class Traversal(NamedTuple):
    """Calls in order, read at the positions of `pair`. In a "chain" each takes what the one before returned."""

    pair: tuple[Path, Path]
    calls: list[Call]
    form: StackForm = "chain"

    @property
    def measured(self) -> list[tuple[float, ...]]:
        """Exponent, relative size and correlation of each transition."""
        if self.form == "entries":
            return [call.steps_on_host[self.pair[0]] for call in self.calls[1:]]
        return [call.on_host[self.pair] for call in self.calls]

    @property
    def may_be_stream(self) -> bool:
        """True for a chain, unless the adapter does not read it and no block changes it, as an argument passed on."""
        return len(self.calls) > 1 and (self.pair[0] is ADAPTERS or self.changes)

    @property
    def num_blocks(self) -> int:
        """Different blocks among the calls."""
        return len({call.layer for call in self.calls})

    @property
    def changes(self) -> bool:
        """True if a block changes the state."""
        return any(size > 0.0 for _, size, _ in self.measured)

    @property
    def correlation(self) -> float:
        """Mean correlation of the end of a transition with its start. NaN if most states have no variance.

        A stream may begin with a constant, as queries that begin at zero.
        """
        known = [correlation for _, _, correlation in self.measured if not math.isnan(correlation)]
        return sum(known) / len(known) if 2 * len(known) > len(self.measured) else math.nan

    @property
    def requires_grad(self) -> bool:
        into, out = self.pair
        last = self.calls[-1]
        return last.entered[into].requires_grad if self.form == "entries" else last.left[out].requires_grad

    @property
    def in_gradients(self) -> bool:
        return any(call.in_gradients for call in self.calls)


def to_host(calls: list[Call]) -> None:
    """Copy all checksums and measurements of `calls`, in one synchronisation each."""
    states = [state for call in calls for state in (*call.entered.values(), *call.left.values()) if not state.on_host]
    if states:
        device = states[0].sums.device
        sums = iter(torch.cat([state.sums.to(device) for state in states]).tolist())
        for state in states:
            state.on_host = tuple(next(sums) for _ in state.dtypes)
    measured = [(call.on_host, pair, values) for call in calls for pair, values in call.updates.items()]
    measured += [(call.steps_on_host, path, values) for call in calls for path, values in call.steps.items()]
    if measured:
        device = measured[0][2].device
        on_host = torch.stack([each.to(device) for _, _, each in measured]).tolist()
        for (kept, key, _), values in zip(measured, on_host, strict=True):
            kept[key] = tuple(values)


def pairs(calls: list[Call]) -> list[tuple[Path, Path]]:
    """Return the positions of a state that occur in `calls`, the adapter's own first, then the sum of two."""
    found = dict.fromkeys(pair for call in calls for pair in call.on_host)
    return sorted(found, key=lambda pair: (pair != (ADAPTERS, ADAPTERS), pair != (SUM, SUM)))


_FOLLOWS: dict[StackForm, Callable[[Call, Call, tuple[Path, Path]], bool]] = {
    "chain": Call.takes_output_of,
    "pairs": Call.descends_from,
    "entries": Call.follows_entry_of,
}


def traverse(calls: list[Call], pair: tuple[Path, Path], form: StackForm = "chain") -> Traversal | None:
    """Return the traversal of most blocks by the states of `pair`, with gradients if possible, and the first of these.

    Each call takes the output of the one before; in other forms than "chain" a state that was computed from it. Blocks
    that are called again later in another order, as in a loop over the whole stack, are left to the next traversal.
    """
    follows = _FOLLOWS[form]
    best: Traversal | None = None
    for start, first in enumerate(calls):
        if not _holds(first, pair, form):
            continue
        path = [first]
        for call in calls[start + 1 :]:
            last = path[-1]
            in_turn = call.layer >= last.layer and call.began > (last.ended or 0) and _holds(call, pair, form)
            if in_turn and follows(call, last, pair):
                path.append(call)
        found = Traversal(pair, path, form)
        if best is None or _rank(found) > _rank(best):
            best = found
        if best.in_gradients and best.calls[-1] is calls[-1]:
            break
    return best


def _holds(call: Call, pair: tuple[Path, Path], form: StackForm) -> bool:
    return pair[0] in call.entered if form == "entries" else pair in call.on_host


def _rank(traversal: Traversal) -> tuple[int, bool, int]:
    return traversal.num_blocks, traversal.in_gradients, len(traversal.calls)


def is_contiguous(calls: list[Call], traversal: Traversal) -> bool:
    chosen = set(map(id, traversal.calls))
    began, ended = traversal.calls[0].began, traversal.calls[-1].began
    return all(id(call) in chosen for call in calls if began <= call.began <= ended)


def only_skips(calls: list[Call], best: Traversal) -> bool:
    """Return True if blocks were left out of `best`, and none of the others called in between broke the chain."""
    if not is_contiguous(calls, best):
        return False
    first, last = calls.index(best.calls[0]), calls.index(best.calls[-1])
    begins = first == 0 or calls[first - 1].layer >= best.calls[0].layer
    return begins and (last + 1 == len(calls) or calls[last + 1].layer <= best.calls[-1].layer)
