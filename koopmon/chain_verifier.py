"""Verification of residual chains: one real forward pass shows which candidate stack is a residual stream.

A stack is a *verified chain* if one forward of the model holds a complete traversal of it: calls of all blocks in
order, in which the output of each is the input of the next, and all states share one shape (..., T, D). Calls beside
that traversal, such as a second one with other tokens, do not matter. A block that is called several times in a row
is as many points. A block that was skipped is an identity; other forwards must show that it belongs to the chain.
`discover`, `profile` and the agent all use `ChainVerifier`.

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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, Path, Point, Stack, StatePosition
from koopmon.block_finder import normalised
from koopmon.spectral import LARGEST_EXPONENT, stack_exponent, update_exponent
from koopmon.state_position import argument_tensors, is_state, output_tensors

SAMPLED_ROWS = 1024
"""Rows of each state in which the update of a block is measured."""
COMPARED_VALUES = 1 << 18
"""Values of each state that are compared between the end of one block and the start of the next, if not all are."""
MIN_COMPARED_ROWS = 32
MIN_UPDATE = 0.01
"""Least size of an update, relative to the state, that shows its growth."""
MIN_CARRIED = 0.25
"""Least mean correlation between a block's input and output, for a stack that is not known to be residual."""
MAX_CALLS = 1024
"""Calls of the blocks of one candidate that are observed in one forward."""
MAX_PAIRS = 16
"""Pairs of an argument and a result of one shape that are measured in one call."""
MIN_SHARE_CALLED = 0.5
"""Least share of its blocks that must have been called, of a stack that skips blocks in every forward."""

_ADAPTERS: Path = ("the adapter's",)
"""Stands for the state that the adapter reads."""
_NARROWER = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = -7046029254386353131
"""2^64 / golden ratio as a signed integer: multiples of it spread over all 64 bits."""


class ChainResult(NamedTuple):
    """`stack` is the kept one, None if no candidate is a chain.

    `reasons` holds the reason against each other one, by name.
    """

    stack: Stack | None
    reasons: dict[str, str]


@dataclass(slots=True, eq=False)
class _State:
    """One tensor at the entry or the exit of a call. `sums` are checksums of its rows, in each type of `dtypes`."""

    shape: torch.Size
    local_shape: torch.Size
    dtypes: tuple[torch.dtype, ...]
    sums: Tensor
    rows: Tensor | None
    requires_grad: bool
    on_host: tuple[int, ...] = ()

    def equals(self, other: _State) -> bool:
        """Compare in the narrower of both types, because mixed precision may cast between blocks."""
        narrow = min(self.dtypes[0], other.dtypes[0], key=lambda dtype: dtype.itemsize)
        if self.shape != other.shape or self.local_shape != other.local_shape:
            return False  # in the second case one of them is sharded and the other is not
        if narrow not in self.dtypes or narrow not in other.dtypes:
            return False
        return self.on_host[self.dtypes.index(narrow)] == other.on_host[other.dtypes.index(narrow)]


@dataclass(slots=True, eq=False)
class _Call:
    """One call of a block. `began` and `ended` are moments of the forward."""

    layer: int
    began: int
    entered: dict[Path, _State]
    in_gradients: bool
    ended: int | None = None
    left: dict[Path, _State] = field(default_factory=dict)
    updates: dict[tuple[Path, Path], Tensor] = field(default_factory=dict)
    """Per pair of states, (3,): the update's exponent, its relative size, the correlation of output and input."""
    on_host: dict[tuple[Path, Path], tuple[float, ...]] = field(default_factory=dict)


class _Traversal(NamedTuple):
    """Calls in order of which each takes what the one before has returned, read at the positions of `pair`."""

    pair: tuple[Path, Path]
    calls: list[_Call]

    @property
    def may_be_stream(self) -> bool:
        """True for a chain, unless the adapter does not read it and no block changes it, as an argument passed on."""
        return len(self.calls) > 1 and (self.pair[0] is _ADAPTERS or self.changes)

    @property
    def num_blocks(self) -> int:
        """Different blocks among the calls."""
        return len({call.layer for call in self.calls})

    @property
    def changes(self) -> bool:
        """True if a block changes the state."""
        return any(call.on_host[self.pair][1] > 0.0 for call in self.calls)

    @property
    def requires_grad(self) -> bool:
        return self.calls[-1].left[self.pair[1]].requires_grad

    @property
    def in_gradients(self) -> bool:
        return any(call.in_gradients for call in self.calls)


class _Trace:
    """Observations of one candidate stack."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.partly: set[int] = set()
        """Layers on incomplete traversals, over all forwards."""
        self.reset()

    def reset(self) -> None:
        self.calls: list[_Call] = []
        self.open: list[_Call] = []
        self.flaw: str | None = None
        """The reason why the adapter reads no state in some call."""
        self.kept: _Traversal | None = None

    def point(self, layer: int) -> Point:
        return self.stack.points[layer]

    @property
    def last_call(self) -> int:
        return max((call.ended or 0 for call in self.calls), default=0)

    @property
    def changes_shape(self) -> bool:
        own = [(call.entered.get(_ADAPTERS), call.left.get(_ADAPTERS)) for call in self.calls]
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

    def reset(self) -> None:
        """Drop all observations of the forward. The blocks that incomplete traversals have shown are remembered."""
        for trace in self._traces.values():
            trace.reset()
        self._clock = 0

    @property
    def any_called(self) -> bool:
        """True if a block of a candidate was called."""
        return any(trace.calls for trace in self._traces.values())

    def observe_input(self, stack: Stack, layer: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Observe the call arguments of block `layer` of `stack`, just before it runs."""
        trace, point = self._traces[stack.name], stack.points[layer]
        self._clock += 1
        own = self.adapter.block_input(point.entry, args, kwargs)
        if len(trace.calls) >= MAX_CALLS:
            return
        others = argument_tensors(args, kwargs) if self._may_look_elsewhere(point) else []
        states = self._states(trace, point, own, others, "takes")
        in_gradients = torch.is_grad_enabled() or any(state.requires_grad for state in states.values())
        call = _Call(layer, self._clock, states, in_gradients)
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
        others = output_tensors(output) if self._may_look_elsewhere(point) else []
        call.left, call.ended = self._states(trace, point, own, others, "returns"), self._clock
        for into, x in call.entered.items():
            for out, y in call.left.items():
                alike = x.shape == y.shape and x.local_shape == y.local_shape
                if alike and (into is _ADAPTERS) == (out is _ADAPTERS) and len(call.updates) < MAX_PAIRS:
                    call.updates[into, out] = _update(x.rows, y.rows)
        for state in (*call.entered.values(), *call.left.values()):
            state.rows = None

    def _may_look_elsewhere(self, point: Point) -> bool:
        return not self.adapter.fixed_state and point.entry is point.module

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

    @torch.no_grad()
    def _states(
        self, trace: _Trace, point: Point, own: Tensor | None, others: list[tuple[Path, Tensor]], verb: str
    ) -> dict[Path, _State]:
        """Return checksums of the states by their paths. A flaw of the adapter's own state is noted."""
        flaw = None
        if own is None:
            flaw = "no floating-point tensor that could be a state"
        elif not is_state(own):
            flaw = f"{_describe(own)}, no state of shape (..., T, D)"
        if flaw is not None:
            trace.flaw = trace.flaw or f"{point.name} {verb} {flaw}"
        found = [] if own is None or flaw is not None else [(_ADAPTERS, own)]
        return {path: _state(tensor) for path, tensor in (*found, *others)}

    def verdict(self, trained: Collection[int] = (), *, skips: bool = False) -> ChainResult:
        """Return the kept stack and, for every other candidate by name, the reason against it.

        Synchronises once per candidate. A verified stack loses to one that encloses it. Of the others, those that train
        come first: `trained` holds the ids of the parameters that an optimizer updates. Then the longest is kept, and
        of equal ones the last called, which in an encoder-decoder is the decoder, next to the loss. A stack is also
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
            key=lambda trace: (trains[id(trace)], _in_gradients(trace), _depth(trace), trace.last_call), reverse=True
        )
        for trace in eligible[1:]:
            kept = eligible[0]
            if trains[id(kept)] > trains[id(trace)]:
                why = "trains"
            elif _in_gradients(kept) > _in_gradients(trace):
                why = "is called with gradients"
            else:
                why = "is longer" if _depth(kept) > _depth(trace) else "comes later"
            name = kept.stack.name
            reasons[trace.stack.name] = f"is a chain of {_depth(trace)} blocks, but {name!r} {why}"
        return ChainResult(_unrolled(eligible[0]) if eligible else None, reasons)

    def _trains(self, trace: _Trace, trained: Collection[int]) -> bool:
        return bool(trained_layers(trace.stack, trained)) and _in_gradients(trace)

    def in_gradients(self, stack: Stack) -> bool:
        """Return True if the traversal of `stack` ran with gradients."""
        return _in_gradients(self._traces[stack.name])

    def is_interleaved(self, stack: Stack) -> bool:
        """Return True if blocks of `stack` were called for other states between the calls of the traversal."""
        trace = self._traces[stack.name]
        return trace.kept is not None and not _is_contiguous(trace.calls, trace.kept)

    @property
    def is_partial(self) -> bool:
        """True if the blocks that were called chain in some candidate, but not all of its blocks were called."""
        return any(trace.kept is None and len(trace.partly) > 1 for trace in self._traces.values())

    def update_exponent(self, stack: Stack) -> float | None:
        """Return the exponent by which the updates of `stack` grow with the state.

        The structure of the blocks gives it, else this forward pass. It is None if most blocks did not change the
        state.
        """
        known = known_exponent(self.adapter, stack)
        if known is not None:
            return known
        kept = self._traces[stack.name].kept
        updates = [] if kept is None else [call.on_host[kept.pair] for call in kept.calls]
        grown = [exponent for exponent, size, _ in updates if size >= MIN_UPDATE]
        return stack_exponent(grown) if 2 * len(grown) >= len(stack.points) else None

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
        trace.kept = None
        calls = [call for call in trace.calls if call.ended is not None]
        if not trace.calls:
            return "none of its blocks was called"
        _to_host(calls)
        num_blocks = len(trace.stack.points)
        found = [best for pair in _pairs(calls) if (best := _traverse(calls, pair)) is not None and best.may_be_stream]
        if not found:
            return self._reason(trace, calls)
        # max() returns the first of equals, and the adapter's own pair is the first.
        best = max(found, key=lambda each: (each.num_blocks, each.changes, each.in_gradients, each.requires_grad))
        if best.num_blocks < num_blocks:
            if not _only_skips(calls, best):
                return self._reason(trace, calls)
            trace.partly |= {call.layer for call in best.calls}
            enough = len(trace.partly) >= max(2, math.ceil(MIN_SHARE_CALLED * num_blocks))
            if len(trace.partly) < num_blocks and not (skips and enough):
                return self._reason(trace, calls)
        known = trace.stack.residual and best.pair == (_ADAPTERS, _ADAPTERS)
        failure = None if known else _not_carried(best)
        if failure is None:
            trace.kept = best
        return failure

    def _reason(self, trace: _Trace, calls: list[_Call]) -> str:
        """Return the first obstacle to a chain of the adapter's own states."""
        num_blocks = len(trace.stack.points)
        if num_blocks == 1 and len(calls) < 2:
            return f"a chain needs at least 2 blocks, and only {trace.point(0).name} was called"
        if trace.flaw is not None:
            return trace.flaw
        done: list[_Call] = []
        first = trace.calls[0].entered[_ADAPTERS]
        for call in trace.calls:
            name = trace.point(call.layer).name
            if call.layer != len(done) % num_blocks or (done and call.began < (done[-1].ended or math.inf)):
                return f"{name} was called out of turn"
            for states, verb in ((call.entered, "takes"), (call.left, "returns")):
                if _ADAPTERS in states and states[_ADAPTERS].shape != first.shape:
                    shapes = f"{tuple(states[_ADAPTERS].shape)} where the chain began with {tuple(first.shape)}"
                    return f"{name} {verb} shape {shapes}"
            if done and not done[-1].left[_ADAPTERS].equals(call.entered[_ADAPTERS]):
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
            if other is trace or not other.calls or other.changes_shape or alone:
                continue
            for point in other.stack.points:
                if point.module is not first and any(module is first for module in point.module.modules()):
                    return other.stack
        return None


def _to_host(calls: list[_Call]) -> None:
    """Copy all checksums and measurements of `calls`, in one synchronisation each."""
    states = [state for call in calls for state in (*call.entered.values(), *call.left.values()) if not state.on_host]
    if states:
        device = states[0].sums.device
        sums = iter(torch.cat([state.sums.to(device) for state in states]).tolist())
        for state in states:
            state.on_host = tuple(next(sums) for _ in state.dtypes)
    updates = [(call, pair, values) for call in calls for pair, values in call.updates.items()]
    if updates:
        device = updates[0][2].device
        for (call, pair, _), values in zip(
            updates, torch.stack([each.to(device) for _, _, each in updates]).tolist(), strict=True
        ):
            call.on_host[pair] = tuple(values)


def _pairs(calls: list[_Call]) -> list[tuple[Path, Path]]:
    """Return the positions of a state that occur in `calls`, the adapter's own first."""
    found = dict.fromkeys(pair for call in calls for pair in call.on_host)
    return sorted(found, key=lambda pair: pair != (_ADAPTERS, _ADAPTERS))


def _traverse(calls: list[_Call], pair: tuple[Path, Path]) -> _Traversal | None:
    """Return the traversal of most blocks by the states of `pair`, with gradients if possible, and the first of these.

    Blocks that are called again later in another order, as in a loop over the whole stack, are left to the next one.
    """
    into, out = pair
    best: _Traversal | None = None
    for start, first in enumerate(calls):
        if pair not in first.on_host:
            continue
        path = [first]
        for call in calls[start + 1 :]:
            last = path[-1]
            follows = call.layer >= last.layer and call.began > (last.ended or 0) and pair in call.on_host
            if follows and last.left[out].equals(call.entered[into]):
                path.append(call)
        found = _Traversal(pair, path)
        if best is None or _rank(found) > _rank(best):
            best = found
        if best.in_gradients and best.calls[-1] is calls[-1]:
            break
    return best


def _rank(traversal: _Traversal) -> tuple[int, bool, int]:
    return traversal.num_blocks, traversal.in_gradients, len(traversal.calls)


def _is_contiguous(calls: list[_Call], traversal: _Traversal) -> bool:
    chosen = set(map(id, traversal.calls))
    began, ended = traversal.calls[0].began, traversal.calls[-1].began
    return all(id(call) in chosen for call in calls if began <= call.began <= ended)


def _only_skips(calls: list[_Call], best: _Traversal) -> bool:
    """Return True if blocks were left out of `best`, and none of the others called in between broke the chain."""
    if not _is_contiguous(calls, best):
        return False
    first, last = calls.index(best.calls[0]), calls.index(best.calls[-1])
    begins = first == 0 or calls[first - 1].layer >= best.calls[0].layer
    return begins and (last + 1 == len(calls) or calls[last + 1].layer <= best.calls[-1].layer)


def _in_gradients(trace: _Trace) -> bool:
    if trace.kept is not None:
        return trace.kept.in_gradients
    return any(call.in_gradients for call in trace.calls)


def _depth(trace: _Trace) -> int:
    return len(_unrolled(trace).points)


def _unrolled(trace: _Trace) -> Stack:
    """Return the stack of the kept traversal, with its position, and with a point for each call of a repeated block."""
    stack, kept = trace.stack, trace.kept
    if kept is None:
        return stack
    if kept.pair != (_ADAPTERS, _ADAPTERS):
        stack = replace(stack, position=StatePosition(*kept.pair))
    layers = sorted({*range(len(stack.points))}.difference(call.layer for call in kept.calls))
    order = sorted([*layers, *(call.layer for call in kept.calls)])
    points = (stack.points[layer] for layer in order)
    return replace(stack, points=tuple(replace(point, layer=layer) for layer, point in enumerate(points)))


def _not_carried(traversal: _Traversal) -> str | None:
    carried = [call.on_host[traversal.pair][2] for call in traversal.calls]
    mean = sum(carried) / len(carried)
    if math.isnan(mean):
        return "its states are not finite, or the same at every token: nothing shows that its blocks are residual"
    if mean < MIN_CARRIED:
        return (
            "its blocks chain but do not carry their input forward: the mean correlation of output and input "
            f"is {mean:.2f}, a residual stream has at least {MIN_CARRIED}"
        )
    return None


def trained_layers(stack: Stack, trained: Collection[int]) -> list[int]:
    """Return the layers of `stack` with a parameter among `trained`, the ids of those that an optimizer updates."""
    return [
        point.layer
        for point in stack.points
        if any(id(each) in trained and each.requires_grad for each in point.module.parameters())
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


def _state(tensor: Tensor) -> _State:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # to gather nothing
    rows = sample_rows(local.detach())
    dtypes = (rows.dtype, *(dtype for dtype in _NARROWER if dtype.itemsize < rows.dtype.itemsize))
    compared = rows[:: max(1, len(rows) * rows.shape[-1] // COMPARED_VALUES)]
    if len(compared) < MIN_COMPARED_ROWS:
        compared = rows[:: max(1, len(rows) // MIN_COMPARED_ROWS)]
    sums = torch.stack([_checksum(compared.to(dtype)) for dtype in dtypes])
    return _State(tensor.shape, local.shape, dtypes, sums, rows, tensor.requires_grad)


def _checksum(rows: Tensor) -> Tensor:
    """Return a 0-d int64 that differs for different rows, with a probability of error near 2^-64."""
    bits = (rows + 0).contiguous().view(_BITS[rows.dtype.itemsize]).flatten().to(torch.int64)  # -0 + 0 is 0
    place = torch.arange(1, bits.numel() + 1, device=bits.device) * _ODD
    mixed = (bits + place) * _ODD
    mixed = (mixed ^ (mixed >> 31)) * (place | 1)
    return mixed.sum()


@torch.no_grad()
def sample_rows(state: Tensor) -> Tensor:
    """Return a copy of at most SAMPLED_ROWS evenly spread rows of `state` (..., D), of shape (rows, D).

    Never synchronises with the device.
    """
    leading = state.shape[:-1]
    num_rows = leading.numel()
    flat = torch.arange(min(num_rows, SAMPLED_ROWS), device=state.device)
    flat = flat * num_rows // len(flat)
    index = []
    for size in reversed(leading):
        index.append(flat % size)
        flat = flat // size
    return state[tuple(reversed(index))]


@torch.no_grad()
def _update(x: Tensor | None, y: Tensor | None) -> Tensor:
    """Return (3,) float64: the exponent of the update from x to y, its relative size, and their correlation.

    The correlation is centred over rows. It is NaN if either has no variance.
    """
    assert x is not None
    assert y is not None
    y = y.to(x.device)
    size = (y.double() - x.double()).norm() / x.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    a, b = x.float() - x.float().mean(0), y.float() - y.float().mean(0)
    correlation = (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()
    return torch.stack([update_exponent(x, y).double(), size, correlation.double()])


def _describe(state: Tensor) -> str:
    if state.is_nested or state.layout is not torch.strided:
        return "a nested or sparse tensor"
    return f"a {str(state.dtype).removeprefix('torch.')} tensor of shape {tuple(state.shape)}"


class Walk:
    """Follows the first traversal of a kept stack through one forward. A block that is skipped is passed over."""

    def __init__(self, stack: Stack) -> None:
        self._layers: dict[int, list[int]] = {}
        for point in stack.points:
            self._layers.setdefault(id(point.module), []).append(point.layer)
        self.position = 0
        """Transitions passed: the state after them is h_position."""
        self.inside: int | None = None
        """The layer whose block runs now."""
        self.called: list[int] = []

    def following(self, point: Point) -> int | None:
        """Return the layer of a call of the block of `point` now; None if it does not belong to the traversal."""
        if self.inside is not None:
            return None
        return next((layer for layer in self._layers[id(point.module)] if layer >= self.position), None)

    def enter(self, layer: int) -> None:
        """Begin the call of the block of `layer`."""
        self.inside = self.position = layer

    def leave(self, point: Point) -> int | None:
        """End the call of the block of `point`; return its layer, or None if it does not belong to the traversal."""
        layer = self.inside
        if layer is None or layer not in self._layers[id(point.module)]:
            return None
        self.called.append(layer)
        self.inside, self.position = None, layer + 1
        return layer
