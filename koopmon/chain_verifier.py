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
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, Path, Point, Stack, StackForm, StatePosition
from koopmon.block_finder import normalised
from koopmon.lineage import Lineage, ValueLineage
from koopmon.observed_states import describe, measure_update, observe
from koopmon.planes import has_channels_first
from koopmon.spectral import LARGEST_EXPONENT, stack_exponent
from koopmon.state_position import SUM, argument_tensors, is_state, output_tensors, summed
from koopmon.traversals import ADAPTERS, Call, Traversal, is_contiguous, only_skips, pairs, to_host, traverse

MAX_CALLS = 1024
"""Calls of the blocks of one candidate that are observed in one forward."""
MAX_PAIRS = 16
"""Pairs of an argument and a result of one shape that are measured in one call."""
MIN_UPDATE = 0.01
"""Least size of an update, relative to the state, that shows its growth."""
MIN_CARRIED = 0.25
"""Least mean correlation between a block's input and output, for a stack that is not known to be residual."""
MIN_SHARE_CALLED = 0.5
"""Least share of its blocks that must have been called, of a stack that skips blocks in every forward."""


class ChainResult(NamedTuple):
    """`stack` is the kept one, None if no candidate is a chain.

    `reasons` holds the reason against each other one, by name.
    """

    stack: Stack | None
    reasons: dict[str, str]


class _Trace:
    """Observations of one candidate stack."""

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


class ChainVerifier:
    """Decides which of `candidates` is a verified chain. The module's docstring shows its use."""

    def __init__(self, adapter: ArchitectureAdapter, candidates: Sequence[Stack]) -> None:
        self.adapter = adapter
        self.candidates = tuple(candidates)
        self._traces = {stack.name: _Trace(stack) for stack in self.candidates}
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
        self, trace: _Trace, point: Point, own: Tensor | None, others: list[tuple[Path, Tensor]], verb: str
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
        verified: list[_Trace] = []
        for trace in self._traces.values():
            failure = self._failure(trace, skips)
            if failure is None:
                verified.append(trace)
            else:
                reasons[trace.stack.name] = failure
        eligible: list[_Trace] = []
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
                _in_gradients(trace),
                _precedence(trace),
                _depth(trace),
                trace.last_call,
            ),
            reverse=True,
        )
        for trace in eligible[1:]:
            kept = eligible[0]
            if trains[id(kept)] > trains[id(trace)]:
                why = "trains"
            elif _in_gradients(kept) > _in_gradients(trace):
                why = "is called with gradients"
            elif _precedence(kept) > _precedence(trace):
                why = "has transitions of its own blocks" if not _is_chain(kept) else "is unchanged between its blocks"
            else:
                why = "is longer" if _depth(kept) > _depth(trace) else "comes later"
            name = kept.stack.name
            kind = "chain" if _is_chain(trace) else "stack"
            reasons[trace.stack.name] = f"is a {kind} of {_depth(trace)} blocks, but {name!r} {why}"
        self.beside = tuple(
            trace.stack
            for trace in eligible[1:]
            if (trains[id(trace)], _in_gradients(trace)) == (trains[id(eligible[0])], _in_gradients(eligible[0]))
            and not _overlap(trace, eligible[0])
        )
        held = [trace for trace in eligible[1:] if trace.stack not in self.beside and not _overlap(trace, eligible[0])]
        held += [trace for trace in self._traces.values() if eligible and self._is_aside(trace)]
        self.later = tuple(trace.stack for trace in held if _holds_any(trace.stack, trained))
        # The first layers of blocks are candidates for blocks that are called by other methods.
        hidden = {trace.stack.name for trace in self._traces.values() if trace.stack.form != "chain"}
        shown = {name: reason for name, reason in reasons.items() if name not in hidden}
        return ChainResult(_unrolled(eligible[0]) if eligible else None, shown)

    def _is_aside(self, trace: _Trace) -> bool:
        """Return True for a stack that this forward did not call, with no block inside or around those of others."""
        if trace.calls or trace.stack.form != "chain" or len(trace.stack.points) < 2:
            return False
        own = {module for point in trace.stack.points for module in point.module.modules()}
        others = (each for each in self._traces.values() if each is not trace)
        stacks = (each.stack for each in others if each.calls or each.stack.form == "chain")
        return all(own.isdisjoint(point.module.modules()) for stack in stacks for point in stack.points)

    def _trains(self, trace: _Trace, trained: Collection[int]) -> bool:
        return bool(trained_layers(trace.stack, trained)) and _in_gradients(trace)

    def in_gradients(self, stack: Stack) -> bool:
        """Return True if the traversal of `stack` ran with gradients."""
        return _in_gradients(self._traces[stack.name])

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

    def _failure(self, trace: _Trace, skips: bool) -> str | None:
        """Find the traversal of `trace`; return the reason if there is none that may be kept."""
        failure = self._no_chain(trace, skips)
        trace.lineage = Lineage()  # it holds parts of the graph
        if trace.stack.form != "chain" and failure is None:
            trace.kept, failure = None, f"its blocks are read in the form {trace.stack.form!r} alone"
        return failure if failure is None or trace.partly else self._no_mixing(trace, failure, skips)

    def _no_mixing(self, trace: _Trace, failure: str, skips: bool) -> str | None:
        """Find the traversal of a model that mixes between its blocks; return `failure` if there is none."""
        calls = [call for call in trace.calls if call.ended is not None]
        num_blocks = len(trace.stack.points)
        forms: tuple[StackForm, ...] = ("pairs", "entries") if trace.stack.form == "chain" else (trace.stack.form,)
        for form in forms:
            positions = pairs(calls) if form == "pairs" else [(path, path) for path in _entries(calls)]
            found = [traverse(calls, pair, form) for pair in positions]
            complete = [
                each
                for each in found
                if each is not None
                and (each.num_blocks == num_blocks or self._is_enough(trace, calls, each, skips))
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
                trace.kept = best
                return None
            failure = why
        return failure

    def _is_enough(self, trace: _Trace, calls: list[Call], part: Traversal, skips: bool) -> bool:
        """Return True if `part`, which skips blocks, and those of earlier forwards show all blocks."""
        if part.form != "pairs" or len(part.calls) < max(2, len(calls)):
            return False
        trace.partly_mixed |= {call.layer for call in part.calls}
        return _shows_enough(trace.partly_mixed, len(trace.stack.points), skips)

    def _no_chain(self, trace: _Trace, skips: bool) -> str | None:
        """Find the traversal of a chain; return the reason if there is none that may be kept."""
        trace.kept = None
        calls = [call for call in trace.calls if call.ended is not None]
        if not trace.calls:
            return "none of its blocks was called"
        to_host(calls)
        num_blocks = len(trace.stack.points)
        found = [best for pair in pairs(calls) if (best := traverse(calls, pair)) is not None and best.may_be_stream]
        own = next((each for each in found if each.pair == (ADAPTERS, ADAPTERS)), None)
        if own is None or not own.changes or not own.correlation < MIN_CARRIED:
            # A sum is also carried if one of its parts is.
            found = [each for each in found if each.pair != (SUM, SUM)]
        if not found:
            return self._reason(trace, calls)
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
                return self._reason(trace, calls)
            trace.partly |= {call.layer for call in best.calls}
            if not _shows_enough(trace.partly, num_blocks, skips):
                return self._reason(trace, calls)
        known = trace.stack.residual and best.pair == (ADAPTERS, ADAPTERS)
        failure = None if known else _not_carried(best)
        if failure is None:
            trace.kept = best
        return failure

    def _reason(self, trace: _Trace, calls: list[Call]) -> str:
        """Return the first obstacle to a chain of the adapter's own states."""
        num_blocks = len(trace.stack.points)
        if num_blocks == 1 and len(calls) < 2:
            return f"a chain needs at least 2 blocks, and only {trace.point(0).name} was called"
        if trace.flaw is not None:
            return trace.flaw
        done: list[Call] = []
        first = trace.calls[0].entered[ADAPTERS]
        for call in trace.calls:
            name = trace.point(call.layer).name
            if call.layer != len(done) % num_blocks or (done and call.began < (done[-1].ended or math.inf)):
                return f"{name} was called out of turn"
            for states, verb in ((call.entered, "takes"), (call.left, "returns")):
                if ADAPTERS in states and states[ADAPTERS].shape != first.shape:
                    shapes = f"{tuple(states[ADAPTERS].shape)} where the chain began with {tuple(first.shape)}"
                    return f"{name} {verb} shape {shapes}"
            if done and not done[-1].left[ADAPTERS].equals(call.entered[ADAPTERS]):
                return f"the output of {trace.point(done[-1].layer).name} is not the input of {name}"
            done.append(call)
        return f"only {len(done)} of its {num_blocks} blocks were called"

    def _enclosing(self, trace: _Trace) -> Stack | None:
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


def _shows_enough(layers: set[int], num_blocks: int, skips: bool) -> bool:
    """Return True for all blocks, or with `skips` for most of them."""
    return len(layers) == num_blocks or (skips and len(layers) >= max(2, math.ceil(MIN_SHARE_CALLED * num_blocks)))


def _overlap(one: _Trace, other: _Trace) -> bool:
    """Return True if blocks of one stack are called between those of the other: they change one stream in turn."""
    if one.kept is None or other.kept is None:
        return False
    first, second = ((kept.calls[0].began, kept.calls[-1].began) for kept in (one.kept, other.kept))
    return first[0] < second[1] and second[0] < first[1]


def _holds_any(stack: Stack, trained: Collection[int]) -> bool:
    return any(id(each) in trained for point in stack.points for each in point.parameters())


def _in_gradients(trace: _Trace) -> bool:
    if trace.kept is not None:
        return trace.kept.in_gradients
    return any(call.in_gradients for call in trace.calls)


def _measure_step(before: Call, call: Call) -> None:
    """Measure the step from the entry of one call to that of the next. The rows of the first are not needed again."""
    for path, x in before.entered.items():
        y = call.entered.get(path)
        if y is not None and x.shape == y.shape and x.local_shape == y.local_shape:
            call.steps[path] = measure_update(x.rows, y.rows)
        x.rows = None


def _is_chain(trace: _Trace) -> bool:
    return trace.kept is None or trace.kept.form == "chain"


def _precedence(trace: _Trace) -> int:
    return 0 if trace.kept is None else ("entries", "pairs", "chain").index(trace.kept.form)


def _entries(calls: list[Call]) -> list[Path]:
    return list(dict.fromkeys(path for call in calls for path in call.entered))


def _depth(trace: _Trace) -> int:
    return _unrolled(trace).num_layers


def _unrolled(trace: _Trace) -> Stack:
    """Return the stack of the kept traversal, with its position, and with a point for each call of a repeated block."""
    stack, kept = trace.stack, trace.kept
    if kept is None:
        return stack
    if kept.pair != (ADAPTERS, ADAPTERS):
        stack = replace(stack, position=StatePosition(*kept.pair))
    layers = sorted({*range(len(stack.points))}.difference(call.layer for call in kept.calls))
    order = sorted([*layers, *(call.layer for call in kept.calls)])
    points = (stack.points[layer] for layer in order)
    numbered = tuple(replace(point, layer=layer) for layer, point in enumerate(points))
    return replace(stack, points=numbered, form=kept.form)


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
