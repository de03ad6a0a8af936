"""One candidate stack in a forward: the calls of its blocks, and whether they form a traversal of a residual stream."""

from __future__ import annotations

import math
from dataclasses import replace

from koopmon.api import Path, Point, Stack, StackForm, StatePosition
from koopmon.lineage import Lineage
from koopmon.state_position import SUM
from koopmon.traversals import ADAPTERS, Call, Traversal, is_contiguous, only_skips, pairs, to_host, traverse

MIN_CARRIED = 0.25
"""Least mean correlation between a block's input and output, for a stack that is not known to be residual."""
MIN_SHARE_CALLED = 0.5
"""Least share of its blocks that must have been called, of a stack that skips blocks in every forward."""


class CandidateTrace:
    """Calls of the blocks of one candidate stack, and the traversal that they form."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.partly: set[int] = set()
        """Layers on incomplete traversals of a chain, over all forwards."""
        self.partly_mixed: set[int] = set()
        """The same of a model that mixes between its blocks."""
        self.reset()

    def reset(self) -> None:
        self.calls: list[Call] = []
        self.open: list[Call] = []
        self.flaw: str | None = None
        """The reason why the adapter reads no state in some call."""
        self.kept: Traversal | None = None
        self.lineage: Lineage[tuple[int, Path]] = Lineage()

    def point(self, layer: int) -> Point:
        return self.stack.points[layer]

    @property
    def last_call(self) -> int:
        return max((call.ended or 0 for call in self.calls), default=0)

    @property
    def changes_shape(self) -> bool:
        own = [(call.entered.get(ADAPTERS), call.left.get(ADAPTERS)) for call in self.calls]
        return any(x is not None and y is not None and x.shape != y.shape for x, y in own) or any(
            left is not None and entered is not None and left.shape != entered.shape
            for (_, left), (entered, _), call, following in zip(own, own[1:], self.calls, self.calls[1:], strict=False)
            if following.layer == call.layer + 1
        )

    @property
    def in_gradients(self) -> bool:
        """True if the traversal, or a call without one, ran with gradients."""
        if self.kept is not None:
            return self.kept.in_gradients
        return any(call.in_gradients for call in self.calls)

    @property
    def is_chain(self) -> bool:
        return self.kept is None or self.kept.form == "chain"

    @property
    def precedence(self) -> int:
        """Rank of the form: a chain comes first."""
        return 0 if self.kept is None else ("entries", "pairs", "chain").index(self.kept.form)

    @property
    def depth(self) -> int:
        return self.unrolled().num_layers

    def overlaps(self, other: CandidateTrace) -> bool:
        """Return True if blocks of one stack are called between those of the other: they change one stream in turn."""
        if self.kept is None or other.kept is None:
            return False
        first, second = ((kept.calls[0].began, kept.calls[-1].began) for kept in (self.kept, other.kept))
        return first[0] < second[1] and second[0] < first[1]

    def unrolled(self) -> Stack:
        """Return the stack of the kept traversal, with its position and a point for each call of a repeated block."""
        stack, kept = self.stack, self.kept
        if kept is None:
            return stack
        if kept.pair != (ADAPTERS, ADAPTERS):
            stack = replace(stack, position=StatePosition(*kept.pair))
        layers = sorted({*range(len(stack.points))}.difference(call.layer for call in kept.calls))
        order = sorted([*layers, *(call.layer for call in kept.calls)])
        points = (stack.points[layer] for layer in order)
        numbered = tuple(replace(point, layer=layer) for layer, point in enumerate(points))
        return replace(stack, points=numbered, form=kept.form)

    def failure(self, *, skips: bool) -> str | None:
        """Find the traversal; return the reason if there is none that may be kept."""
        failure = self._no_chain(skips)
        self.lineage = Lineage()  # it holds parts of the graph
        if self.stack.form != "chain" and failure is None:
            self.kept, failure = None, f"its blocks are read in the form {self.stack.form!r} alone"
        return failure if failure is None or self.partly else self._no_mixing(failure, skips)

    def _no_mixing(self, failure: str, skips: bool) -> str | None:
        """Find the traversal of a model that mixes between its blocks; return `failure` if there is none."""
        calls = [call for call in self.calls if call.ended is not None]
        num_blocks = len(self.stack.points)
        forms: tuple[StackForm, ...] = ("pairs", "entries") if self.stack.form == "chain" else (self.stack.form,)
        for form in forms:
            positions = pairs(calls) if form == "pairs" else [(path, path) for path in _entries(calls)]
            found = [traverse(calls, pair, form) for pair in positions]
            complete = [
                each
                for each in found
                if each is not None
                and (each.num_blocks == num_blocks or self._is_enough(calls, each, skips))
                and len(each.measured) > 1
                # Projections that begin at zero make each block an identity in the first forward.
                and (each.changes or (form == "pairs" and each.pair == (ADAPTERS, ADAPTERS)))
                and (form == "pairs" or is_contiguous(calls, each))
            ]
            if not complete:
                continue
            best = max(complete, key=lambda each: (each.in_gradients, each.requires_grad))
            why = _not_carried(best)
            if why is None:
                self.kept = best
                return None
            failure = why
        return failure

    def _is_enough(self, calls: list[Call], part: Traversal, skips: bool) -> bool:
        """Return True if `part`, which skips blocks, and those of earlier forwards show all blocks."""
        if part.form != "pairs" or len(part.calls) < max(2, len(calls)):
            return False
        self.partly_mixed |= {call.layer for call in part.calls}
        return _shows_enough(self.partly_mixed, len(self.stack.points), skips)

    def _no_chain(self, skips: bool) -> str | None:
        """Find the traversal of a chain; return the reason if there is none that may be kept."""
        self.kept = None
        calls = [call for call in self.calls if call.ended is not None]
        if not self.calls:
            return "none of its blocks was called"
        to_host(calls)
        num_blocks = len(self.stack.points)
        found = [best for pair in pairs(calls) if (best := traverse(calls, pair)) is not None and best.may_be_stream]
        own = next((each for each in found if each.pair == (ADAPTERS, ADAPTERS)), None)
        if own is None or not own.changes or not own.correlation < MIN_CARRIED:
            # A sum is also carried if one of its parts is.
            found = [each for each in found if each.pair != (SUM, SUM)]
        if not found:
            return self._reason(calls)
        # max() returns the first of equals, and the adapter's own pair is the first.
        # A state that the blocks carry forward comes before one that they do not.
        best = max(
            found,
            key=lambda each: (
                each.num_blocks,
                each.changes,
                each.correlation >= MIN_CARRIED,
                each.in_gradients,
                each.requires_grad,
            ),
        )
        if best.num_blocks < num_blocks:
            if not only_skips(calls, best):
                return self._reason(calls)
            self.partly |= {call.layer for call in best.calls}
            if not _shows_enough(self.partly, num_blocks, skips):
                return self._reason(calls)
        known = self.stack.residual and best.pair == (ADAPTERS, ADAPTERS)
        failure = None if known else _not_carried(best)
        if failure is None:
            self.kept = best
        return failure

    def _reason(self, calls: list[Call]) -> str:
        """Return the first obstacle to a chain of the adapter's own states."""
        num_blocks = len(self.stack.points)
        if num_blocks == 1 and len(calls) < 2:
            return f"a chain needs at least 2 blocks, and only {self.point(0).name} was called"
        if self.flaw is not None:
            return self.flaw
        done: list[Call] = []
        first = self.calls[0].entered[ADAPTERS]
        for call in self.calls:
            name = self.point(call.layer).name
            if call.layer != len(done) % num_blocks or (done and call.began < (done[-1].ended or math.inf)):
                return f"{name} was called out of turn"
            for states, verb in ((call.entered, "takes"), (call.left, "returns")):
                if ADAPTERS in states and states[ADAPTERS].shape != first.shape:
                    shapes = f"{tuple(states[ADAPTERS].shape)} where the chain began with {tuple(first.shape)}"
                    return f"{name} {verb} shape {shapes}"
            if done and not done[-1].left[ADAPTERS].equals(call.entered[ADAPTERS]):
                return f"the output of {self.point(done[-1].layer).name} is not the input of {name}"
            done.append(call)
        return f"only {len(done)} of its {num_blocks} blocks were called"


def _shows_enough(layers: set[int], num_blocks: int, skips: bool) -> bool:
    """Return True for all blocks, or with `skips` for most of them."""
    return len(layers) == num_blocks or (skips and len(layers) >= max(2, math.ceil(MIN_SHARE_CALLED * num_blocks)))


def _entries(calls: list[Call]) -> list[Path]:
    return list(dict.fromkeys(path for call in calls for path in call.entered))


def _not_carried(traversal: Traversal) -> str | None:
    mean = traversal.correlation
    if math.isnan(mean):
        return "its states are not finite, or the same at every token: nothing shows that its blocks are residual"
    if mean < MIN_CARRIED:
        form = "chain" if traversal.form == "chain" else "follow one another"
        return (
            f"its blocks {form} but do not carry their input forward: the mean correlation of output and input "
            f"is {mean:.2f}, a residual stream has at least {MIN_CARRIED}"
        )
    return None
