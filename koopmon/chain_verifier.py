"""Verification of residual chains: one real forward pass shows which candidate stack is a residual stream.

A stack is a *verified chain* if one forward of the model holds a complete traversal of it: calls of all blocks in
order, in which the output of each is the input of the next, and all states share one shape (..., T, D). Calls beside
that traversal, such as a second one with other tokens, do not matter. A block that is called several times in a row
is as many points. A block that was skipped is an identity; other forwards must show that it belongs to the chain.
`discover`, `profile` and the agent all use `ChainVerifier`.

A model may mix between its blocks, as h = block(a h + b h_0). Such a stack is kept, in the form "pairs", if one forward
calls all of its blocks in order, each takes a state that was computed from the output of the one before, all states
share one shape, and the blocks carry their input forward by themselves. If they do not, because the model adds their
outputs to the state itself, as h = h + block(h), the stack is kept in the form "entries" if the input of each block
carries that of the one before. The graph of gradients shows what was computed from what, so both need a forward with
gradients, or `compare_values`. A chain has precedence, then pairs.

`watch()` runs these steps; a caller with its own hooks runs them by hand::

    verifier = ChainVerifier(selection.adapter, selection.candidates)
    for stack in verifier.candidates:
        for point in stack.points:
            # forward pre-hook on point.entry, with_kwargs=True, so BEFORE the block runs (blocks may write in place):
            verifier.observe_input(stack, point.layer, args, kwargs)
            # forward hook on point.module:
            verifier.observe_output(stack, point.layer, output)
    model(...)
    stack, reasons = verifier.verdict()  # the kept Stack or None; the reason against each other candidate
    verifier.reset()  # drop all observations, to try again on the next forward

Observing keeps checksums of a few sampled rows on the device and never synchronises. `verdict()` synchronises once per
candidate. The verifier raises for no behaviour of the model: a state that is None, misshapen or out of turn becomes the
reason why its stack is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, Path, Point, Stack
from koopmon.block_finder import normalised
from koopmon.candidate_trace import CandidateTrace
from koopmon.lineage import ValueLineage
from koopmon.observed_states import describe, measure_update, observe
from koopmon.planes import has_channels_first
from koopmon.spectral import LARGEST_EXPONENT, stack_exponent
from koopmon.state_position import SUM, argument_tensors, is_state, output_tensors, summed
from koopmon.traversals import ADAPTERS, Call, is_contiguous

MAX_CALLS = 1024
"""Calls of the blocks of one candidate that are observed in one forward."""
MAX_PAIRS = 16
"""Pairs of an argument and a result of one shape that are measured in one call."""
MIN_UPDATE = 0.01
"""Least size of an update, relative to the state, that shows its growth."""


class ChainResult(NamedTuple):
    """`stack` is the kept one, None if no candidate is a chain.

    `reasons` holds the reason against each other one, by name.
    """

    stack: Stack | None
    reasons: dict[str, str]


class ChainVerifier:
    """Decides which of `candidates` is a verified chain. The module's docstring shows its use."""

    def __init__(self, adapter: ArchitectureAdapter, candidates: Sequence[Stack]) -> None:
        self.adapter = adapter
        self.candidates = tuple(candidates)
        self._traces = {stack.name: CandidateTrace(stack) for stack in self.candidates}
        self._clock = 0
        self.beside: tuple[Stack, ...] = ()
        """Other stacks that the last verdict verified and that train as the kept one does, best first."""
        self.later: tuple[Stack, ...] = ()
        """Further stacks, verified or not called, whose parameters the optimizer holds: they did not train here."""

    def reset(self) -> None:
        """Drop all observations of the forward. The blocks that incomplete traversals have shown are remembered."""
        for trace in self._traces.values():
            trace.reset()
        self._clock = 0

    @property
    def any_called(self) -> bool:
        """True if a block of a candidate was called."""
        return any(trace.calls for trace in self._traces.values())

    def compare_values(self, stack: Stack) -> None:
        """Find the origin of the states of `stack` by their values: this forward ran without a graph of gradients."""
        self._traces[stack.name].lineage = ValueLineage()

    @property
    def is_unchanged(self) -> bool:
        """True if blocks were called and none has changed a state, as blocks that begin as identities."""
        sizes = [
            size for trace in self._traces.values() for call in trace.calls for _, size, _ in call.on_host.values()
        ]
        return bool(sizes) and not any(size > 0.0 for size in sizes)

    def observe_input(self, stack: Stack, layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Observe the call arguments of block `layer` of `stack`, just before it runs."""
        trace, point = self._traces[stack.name], stack.points[layer]
        self._clock += 1
        own = self.adapter.block_input(point.entry, args, kwargs)
        if len(trace.calls) >= MAX_CALLS:
            return
        others = argument_tensors(args, kwargs) if self._may_look_elsewhere(point, own) else []
        if others and (both := summed(others, alone=True)) is not None:
            others.append((SUM, both))
        tensors = self._states(trace, point, own, others, "takes")
        states = {path: observe(tensor) for path, tensor in tensors.items()}
        in_gradients = torch.is_grad_enabled() or any(state.requires_grad for state in states.values())
        sources = {path: trace.lineage.sources(tensor) for path, tensor in tensors.items()}
        call = Call(layer, self._clock, states, in_gradients, sources=sources)
        if trace.calls and trace.calls[-1].ended is not None:
            _measure_step(trace.calls[-1], call)
        trace.calls.append(call)
        trace.open.append(call)

    def observe_output(self, stack: Stack, layer: int, output: Any) -> None:
        """Observe the return value of block `layer` of `stack`, just after it has run."""
        trace, point = self._traces[stack.name], stack.points[layer]
        self._clock += 1
        own = self.adapter.block_output(point.module, output)
        call = trace.open.pop() if trace.open and trace.open[-1].layer == layer else None
        if call is None:
            return
        others = output_tensors(output) if self._may_look_elsewhere(point, own) else []
        if (both := summed(others)) is not None:
            others.append((SUM, both))
        tensors = self._states(trace, point, own, others, "returns")
        call.left, call.ended = {path: observe(tensor) for path, tensor in tensors.items()}, self._clock
        for path, tensor in tensors.items():
            trace.lineage.note_output((self._clock, path), tensor)
        for into, x in call.entered.items():
            for out, y in call.left.items():
                alike = x.shape == y.shape and x.local_shape == y.local_shape
                same_kind = (into is ADAPTERS) == (out is ADAPTERS) and (into is SUM) == (out is SUM)
                if alike and same_kind and len(call.updates) < MAX_PAIRS:
                    call.updates[into, out] = measure_update(x.rows, y.rows)
        for state in call.left.values():
            state.rows = None

    def _may_look_elsewhere(self, point: Point, own: Tensor | None) -> bool:
        # The other tensors of a convolution's call are read as they are, with the width last.
        is_plane = own is not None and is_state(own) and has_channels_first(point.module, own.detach().movedim(-1, 1))
        return not self.adapter.fixed_state and point.entry is point.module and not is_plane

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Observe every candidate by temporary hooks, removed at the end."""
        with ExitStack() as hooks:
            for stack in self.candidates:
                for point in stack.points:
                    before, after = (partial(observe, stack, point) for observe in (self._enter, self._leave))
                    hooks.enter_context(point.entry.register_forward_pre_hook(before, with_kwargs=True))
                    hooks.enter_context(point.module.register_forward_hook(after))
            yield

    def _enter(self, stack: Stack, point: Point, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.observe_input(stack, point.layer, args, kwargs)

    def _leave(self, stack: Stack, point: Point, module: nn.Module, args: Any, output: Any) -> None:
        self.observe_output(stack, point.layer, output)

    def _states(
        self, trace: CandidateTrace, point: Point, own: Tensor | None, others: list[tuple[Path, Tensor]], verb: str
    ) -> dict[Path, Tensor]:
        """Return the states by their paths. A flaw of the adapter's own state is noted."""
        flaw = None
        if own is None:
            flaw = "no floating-point tensor that could be a state"
        elif not is_state(own):
            flaw = f"{describe(own)}, no state of shape (..., T, D)"
        if flaw is not None:
            trace.flaw = trace.flaw or f"{point.name} {verb} {flaw}"
        found = [] if own is None or flaw is not None else [(ADAPTERS, own)]
        return dict((*found, *others))

    def verdict(self, trained: Collection[int] = (), *, skips: bool = False) -> ChainResult:
        """Return the kept stack and, for every other candidate by name, the reason against it.

        Synchronises once per candidate. A verified stack loses to one that encloses it. Of the others, those that train
        come first: `trained` holds the ids of the parameters that an optimizer updates. Then the longest chain is kept,
        and of equal ones the last called, which in an encoder-decoder is the decoder, next to the loss. A stack is also
        rejected if it lies inside the blocks of a stack that keeps a single shape and yet is no chain: it holds
        sublayers, not a residual stream of the model's depth. If the outer blocks change the shape, as stages of a
        hierarchy do, inner stacks are judged by themselves.

        With `skips` a stack may be kept although no forward has called all of its blocks.
        """
        reasons: dict[str, str] = {}
        verified: list[CandidateTrace] = []
        for trace in self._traces.values():
            failure = trace.failure(skips=skips)
            if failure is None:
                verified.append(trace)
            else:
                reasons[trace.stack.name] = failure
        eligible: list[CandidateTrace] = []
        for trace in verified:
            outer = self._enclosing(trace)
            if outer is None:
                eligible.append(trace)
            else:
                reasons[trace.stack.name] = f"is a chain, but inside a block of {outer.name!r}"
        trains = {id(trace): self._trains(trace, trained) for trace in self._traces.values()}
        if trained and not any(trains[id(trace)] for trace in eligible):
            learner = next((trace for trace in self._traces.values() if trains[id(trace)]), None)
            if learner is not None:  # another stack of the same forward trains: it may be a chain in the next one
                for trace in eligible:
                    reasons[trace.stack.name] = f"is a chain that does not train, but {learner.stack.name!r} does"
                eligible = []
        eligible.sort(
            key=lambda trace: (
                trains[id(trace)],
                trace.in_gradients,
                trace.precedence,
                trace.depth,
                trace.last_call,
            ),
            reverse=True,
        )
        for trace in eligible[1:]:
            kept = eligible[0]
            if trains[id(kept)] > trains[id(trace)]:
                why = "trains"
            elif kept.in_gradients > trace.in_gradients:
                why = "is called with gradients"
            elif kept.precedence > trace.precedence:
                why = "has transitions of its own blocks" if not kept.is_chain else "is unchanged between its blocks"
            else:
                why = "is longer" if kept.depth > trace.depth else "comes later"
            name = kept.stack.name
            kind = "chain" if trace.is_chain else "stack"
            reasons[trace.stack.name] = f"is a {kind} of {trace.depth} blocks, but {name!r} {why}"
        self.beside = tuple(
            trace.stack
            for trace in eligible[1:]
            if (trains[id(trace)], trace.in_gradients) == (trains[id(eligible[0])], eligible[0].in_gradients)
            and not trace.overlaps(eligible[0])
        )
        held = [trace for trace in eligible[1:] if trace.stack not in self.beside and not trace.overlaps(eligible[0])]
        held += [trace for trace in self._traces.values() if eligible and self._is_aside(trace)]
        self.later = tuple(trace.stack for trace in held if _holds_any(trace.stack, trained))
        # The first layers of blocks are candidates for blocks that are called by other methods.
        hidden = {trace.stack.name for trace in self._traces.values() if trace.stack.form != "chain"}
        shown = {name: reason for name, reason in reasons.items() if name not in hidden}
        return ChainResult(eligible[0].unrolled() if eligible else None, shown)

    def _is_aside(self, trace: CandidateTrace) -> bool:
        """Return True for a stack that this forward did not call, with no block inside or around those of others."""
        if trace.calls or trace.stack.form != "chain" or len(trace.stack.points) < 2:
            return False
        own = {module for point in trace.stack.points for module in point.module.modules()}
        others = (each for each in self._traces.values() if each is not trace)
        stacks = (each.stack for each in others if each.calls or each.stack.form == "chain")
        return all(own.isdisjoint(point.module.modules()) for stack in stacks for point in stack.points)

    def _trains(self, trace: CandidateTrace, trained: Collection[int]) -> bool:
        return bool(trained_layers(trace.stack, trained)) and trace.in_gradients

    def in_gradients(self, stack: Stack) -> bool:
        """Return True if the traversal of `stack` ran with gradients."""
        return self._traces[stack.name].in_gradients

    def is_interleaved(self, stack: Stack) -> bool:
        """Return True if blocks of `stack` were called for other states between the calls of the traversal."""
        trace = self._traces[stack.name]
        return trace.kept is not None and not is_contiguous(trace.calls, trace.kept)

    @property
    def is_partial(self) -> bool:
        """True if the blocks that were called chain in some candidate, but not all of its blocks were called."""
        return any(
            trace.kept is None and len(trace.partly or trace.partly_mixed) > 1 for trace in self._traces.values()
        )

    def update_exponent(self, stack: Stack) -> float | None:
        """Return the exponent by which the updates of `stack` grow with the state.

        The structure of the blocks gives it, else this forward pass. It is None if most blocks did not change the
        state.
        """
        known = known_exponent(self.adapter, stack)
        if known is not None:
            return known
        kept = self._traces[stack.name].kept
        updates = [] if kept is None else kept.measured
        grown = [exponent for exponent, size, _ in updates if size >= MIN_UPDATE]
        return stack_exponent(grown) if 2 * len(grown) >= stack.num_layers else None

    def fingerprint(self, stack: Stack) -> int:
        """Return a number below 2^32, equal for equal states at the entry of `stack`."""
        kept = self._traces[stack.name].kept
        return 0 if kept is None else kept.calls[0].entered[kept.pair[0]].on_host[0] & 0xFFFFFFFF

    def width(self, stack: Stack) -> int:
        """Return D of the states of `stack`; 0 if it is not kept."""
        kept = self._traces[stack.name].kept
        return 0 if kept is None else kept.calls[0].entered[kept.pair[0]].shape[-1]

    def _enclosing(self, trace: CandidateTrace) -> Stack | None:
        """Return the stack that encloses `trace` and has precedence; None without one.

        It holds the first block of `trace` inside one of its own blocks.
        """
        first = trace.point(0).module
        for other in self._traces.values():
            alone = len(other.stack.points) == 1 and other.kept is None
            if other is trace or not other.calls or (trace.stack.form == "chain" and (other.changes_shape or alone)):
                continue
            for point in other.stack.points:
                if point.module is not first and any(module is first for module in point.module.modules()):
                    return other.stack
        return None


def _holds_any(stack: Stack, trained: Collection[int]) -> bool:
    return any(id(each) in trained for point in stack.points for each in point.parameters())


def _measure_step(before: Call, call: Call) -> None:
    """Measure the step from the entry of one call to that of the next. The rows of the first are not needed again."""
    for path, x in before.entered.items():
        y = call.entered.get(path)
        if y is not None and x.shape == y.shape and x.local_shape == y.local_shape:
            call.steps[path] = measure_update(x.rows, y.rows)
        x.rows = None


def trained_layers(stack: Stack, trained: Collection[int]) -> list[int]:
    """Return the layers of `stack` with a parameter among `trained`, the ids of those that an optimizer updates."""
    return [
        point.layer
        for point in stack.points
        if any(id(each) in trained and each.requires_grad for each in point.parameters())
    ]


def known_exponent(adapter: ArchitectureAdapter, stack: Stack) -> float | None:
    """Return the update exponent of `stack` if no states are needed for it; else None.

    The adapter's value comes first; without one it is 0 if every block normalises. Structure is more reliable than
    states: `benchmarks.brake` counts how often each was right.
    """
    said = adapter.update_exponent(stack)
    if said is not None and math.isfinite(said):
        return min(max(float(said), -LARGEST_EXPONENT), LARGEST_EXPONENT)
    return 0.0 if normalised(stack) else None
