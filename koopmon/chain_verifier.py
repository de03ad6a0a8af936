"""Verification of residual chains: one real forward pass shows which candidate stack is a residual stream.

A stack is a *verified chain* if one forward of the model meets these conditions. Every block was called exactly once
and in order. The output of block l is the input of block l+1. All states share one shape (..., T, D). `discover`,
`profile` and the agent all use `ChainVerifier`.

`watch()` runs these steps; a caller with its own hooks runs them by hand::

    verifier = ChainVerifier(selection.adapter, selection.candidates)
    for stack in verifier.candidates:
        for point in stack.points:
            # forward pre-hook on point.entry, with_kwargs=True, so BEFORE the block runs (blocks may write in place):
            verifier.observe_input(stack, point.layer, adapter.block_input(point.entry, args, kwargs))
            # forward hook on point.module:
            verifier.observe_output(stack, point.layer, adapter.block_output(point.module, output))
    model(...)  # ONE forward; later calls (recomputation, a second microbatch) are not observed
    stack, reasons = verifier.verdict()  # the kept Stack or None; the reason against each other candidate
    verifier.reset()  # drop all observations, to try again on the next forward

Observing keeps a few sampled rows per tap on the device and never synchronises. `verdict()` synchronises once per
candidate. The verifier raises for no behaviour of the model: a state that is None, misshapen or out of turn becomes the
reason why its stack is not kept.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koopmon.api import ArchitectureAdapter, Point, Stack
from koopmon.block_finder import normalised
from koopmon.spectral import LARGEST_EXPONENT, stack_exponent, update_exponent

SAMPLED_ROWS = 1024
"""Rows of each state that are compared between the end of one block and the start of the next."""
MIN_UPDATE = 0.01
"""Least size of an update, relative to the state, that shows its growth."""
MIN_CARRIED = 0.25
"""Least mean correlation between a block's input and output, for a stack that is not known to be residual."""


Also = Callable[[Stack, int, Tensor], None]
"""also(stack, l, h_l): a second observer of every state."""


class ChainResult(NamedTuple):
    """`stack` is the kept one, None if no candidate is a chain.

    `reasons` holds the reason against each other one, by name.
    """

    stack: Stack | None
    reasons: dict[str, str]


class _Trace:
    """Observations of one candidate stack during the forward."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.failure: str | None = None
        self.calls = [0] * len(stack.points)
        """Calls begun, per block."""
        self.done = 0
        """Outputs observed."""
        self.shape: torch.Size | None = None
        self.changes_shape = False
        self.last_call = -1
        self.entered: Tensor | None = None
        self.left: Tensor | None = None
        self.links: list[Tensor] = []
        """Per link l -> l+1 a 0-d boolean tensor: the sampled rows are equal."""
        self.carried: list[Tensor] = []
        """Per block a 0-d tensor: correlation of its output with its input."""
        self.first: Tensor | None = None
        """Sampled rows of the state before the first block."""
        self.growth: list[Tensor] = []
        """Per block, (2,): the update's exponent, and its size relative to the state."""

    def fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason

    def point(self, layer: int) -> Point:
        return self.stack.points[layer]


class ChainVerifier:
    """Decides which of `candidates` is a verified chain. The module's docstring shows its use."""

    def __init__(self, adapter: ArchitectureAdapter, candidates: Sequence[Stack]) -> None:
        self.adapter = adapter
        self.candidates = tuple(candidates)
        self.reset()

    def reset(self) -> None:
        """Drop all observations."""
        self._traces = {stack.name: _Trace(stack) for stack in self.candidates}
        self._clock = 0

    def observe_input(self, stack: Stack, layer: int, state: Tensor | None) -> None:
        """Observe the state h_layer, (..., T, D), just before block `layer` of `stack` is called with it."""
        trace = self._traces[stack.name]
        trace.calls[layer] += 1
        rows = self._rows(trace, layer, state, "takes")
        if rows is None or trace.failure is not None:
            return
        if layer != trace.done or trace.entered is not None:
            trace.fail(f"{trace.point(layer).name} was called out of turn")
            return
        if layer == 0:
            trace.first = rows
        if trace.left is not None:
            trace.links.append(_same_rows(trace.left, rows))
        trace.entered, trace.left = rows, None

    def observe_output(self, stack: Stack, layer: int, state: Tensor | None) -> None:
        """Observe the state h_{layer+1}, (..., T, D), just after block `layer` of `stack` has returned it."""
        trace = self._traces[stack.name]
        self._clock += 1
        trace.last_call = self._clock
        rows = self._rows(trace, layer, state, "returns")
        if rows is None or trace.failure is not None:
            return
        if layer != trace.done or trace.entered is None:
            trace.fail(f"{trace.point(layer).name} returned out of turn")
            return
        if not stack.residual:
            trace.carried.append(_correlation(trace.entered, rows))
        trace.growth.append(_growth(trace.entered, rows))
        trace.entered, trace.left = None, rows
        trace.done += 1

    @contextmanager
    def watch(self, also: Also | None = None) -> Iterator[None]:
        """Observe every candidate by temporary hooks, removed at the end.

        `also` is called as also(stack, l, h_l) with every state of every candidate, h_0 first: 0 <= l <= its blocks.
        """
        with ExitStack() as hooks:
            for stack in self.candidates:
                for point in stack.points:
                    before, after = (partial(observe, stack, point, also) for observe in (self._enter, self._leave))
                    hooks.enter_context(point.entry.register_forward_pre_hook(before, with_kwargs=True))
                    hooks.enter_context(point.module.register_forward_hook(after))
            yield

    def _enter(self, stack: Stack, point: Point, also: Also | None, module: nn.Module, args: Any, kwargs: Any) -> None:
        state = self.adapter.block_input(module, args, kwargs)
        self.observe_input(stack, point.layer, state)
        if also is not None and state is not None and point.layer == 0:
            also(stack, 0, state)

    def _leave(self, stack: Stack, point: Point, also: Also | None, module: nn.Module, args: Any, output: Any) -> None:
        state = self.adapter.block_output(module, output)
        self.observe_output(stack, point.layer, state)
        if also is not None and state is not None:
            also(stack, point.layer + 1, state)

    @torch.no_grad()
    def _rows(self, trace: _Trace, layer: int, state: Tensor | None, verb: str) -> Tensor | None:
        """Return a private copy of sampled rows of `state`, (rows, D); None if it is no state of this chain."""
        name = trace.point(layer).name
        if state is None:
            trace.fail(f"{name} {verb} no floating-point tensor that could be a state")
            return None
        if state.dim() < 2 or not state.is_floating_point() or state.numel() == 0:
            trace.fail(f"{name} {verb} {_describe(state)}, no state of shape (..., T, D)")
            return None
        if trace.shape is None:
            trace.shape = state.shape
        elif state.shape != trace.shape:
            trace.changes_shape = True
            trace.fail(f"{name} {verb} shape {tuple(state.shape)} where the chain began with {tuple(trace.shape)}")
            return None
        local = state.to_local() if hasattr(state, "to_local") else state  # to gather nothing
        return sample_rows(local.detach())

    def verdict(self) -> ChainResult:
        """Return the kept stack and, for every other candidate by name, the reason against it.

        Synchronises once per candidate. A verified stack loses to one that encloses it. Of the others the longest is
        kept, and of equal ones the last called, which in an encoder-decoder is the decoder, next to the loss. A stack
        is also rejected if it lies inside the blocks of a stack that keeps a single shape and yet is no chain: it holds
        sublayers, not a residual stream of the model's depth. If the outer blocks change the shape, as stages of a
        hierarchy do, inner stacks are judged by themselves.
        """
        reasons: dict[str, str] = {}
        verified: list[_Trace] = []
        for trace in self._traces.values():
            failure = self._failure(trace)
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
        eligible.sort(key=lambda trace: (len(trace.stack.points), trace.last_call), reverse=True)
        for trace in eligible[1:]:
            kept = eligible[0].stack
            why = "is longer" if len(kept.points) > len(trace.stack.points) else "comes later"
            reasons[trace.stack.name] = f"is a chain of {len(trace.stack.points)} blocks, but {kept.name!r} {why}"
        return ChainResult(eligible[0].stack if eligible else None, reasons)

    def update_exponent(self, stack: Stack) -> float | None:
        """Return the exponent by which the updates of `stack` grow with the state.

        The structure of the blocks gives it, else this forward pass. It is None if most blocks did not change the
        state. Synchronises.
        """
        known = known_exponent(self.adapter, stack)
        if known is not None:
            return known
        grown = [k for k, size in _together(self._traces[stack.name].growth).tolist() if size >= MIN_UPDATE]
        return stack_exponent(grown) if 2 * len(grown) >= len(stack.points) else None

    def fingerprint(self, stack: Stack) -> int:
        """Return a number below 2^32, equal for equal states at the entry of `stack`. Synchronises."""
        first = self._traces[stack.name].first
        return 0 if first is None else zlib.crc32(first.double().cpu().contiguous().numpy().tobytes())

    def _failure(self, trace: _Trace) -> str | None:
        num_blocks = len(trace.stack.points)
        if not any(trace.calls):
            return "none of its blocks was called"
        if num_blocks == 1:
            repeated = "" if trace.calls[0] == 1 else f" ({trace.calls[0]} times: one layer shared by all depths)"
            return f"a chain needs at least 2 blocks, and only {trace.point(0).name} was called{repeated}"
        for layer, calls in enumerate(trace.calls):
            if calls > 1:
                return f"{trace.point(layer).name} was called {calls} times in one forward: a shared layer or a loop"
        if trace.failure is not None:
            return trace.failure
        if trace.done != num_blocks:
            return f"only {trace.done} of its {num_blocks} blocks were called"
        equal = _together(trace.links).tolist()
        for layer, is_equal in enumerate(equal):
            if not is_equal:
                return f"the output of {trace.point(layer).name} is not the input of {trace.point(layer + 1).name}"
        if trace.carried:
            carried = float(_together(trace.carried).mean())
            if math.isnan(carried):
                return (
                    "its states are not finite, or the same at every token: nothing shows that its blocks are residual"
                )
            if carried < MIN_CARRIED:
                return (
                    "its blocks chain but do not carry their input forward: the mean correlation of output and input "
                    f"is {carried:.2f}, a residual stream has at least {MIN_CARRIED}"
                )
        return None

    def _enclosing(self, trace: _Trace) -> Stack | None:
        """Return the stack that encloses `trace` and has precedence; None without one.

        It holds the first block of `trace` inside one of its own blocks.
        """
        first = trace.point(0).module
        for other in self._traces.values():
            if other is trace or not any(other.calls) or other.changes_shape or len(other.stack.points) == 1:
                continue
            for point in other.stack.points:
                if point.module is not first and any(module is first for module in point.module.modules()):
                    return other.stack
        return None


def known_exponent(adapter: ArchitectureAdapter, stack: Stack) -> float | None:
    """Return the update exponent of `stack` if no states are needed for it; else None.

    The adapter's value comes first; without one it is 0 if every block normalises. Structure is more reliable than
    states: `benchmarks.brake` counts how often each was right.
    """
    said = adapter.update_exponent(stack)
    if said is not None and math.isfinite(said):
        return min(max(float(said), -LARGEST_EXPONENT), LARGEST_EXPONENT)
    return 0.0 if normalised(stack) else None


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


def _same_rows(left: Tensor, entered: Tensor) -> Tensor:
    """Return a 0-d boolean: rows are equal, with NaN equal to NaN.

    They are compared in the narrower of both types, because mixed precision may cast between blocks.
    """
    if left.shape != entered.shape:  # one of them is sharded and the other is not
        return torch.zeros((), dtype=torch.bool, device=left.device)
    if left.dtype != entered.dtype:
        narrow = min(left.dtype, entered.dtype, key=lambda dtype: dtype.itemsize)
        left, entered = left.to(narrow), entered.to(narrow)
    return torch.isclose(left, entered.to(left.device), rtol=0.0, atol=0.0, equal_nan=True).all()


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return the 0-d correlation of x and y, both (rows, D), centred over rows; NaN if either has no variance."""
    x, y = x.float(), y.to(x.device).float()
    x, y = x - x.mean(0), y - y.mean(0)
    return (x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt()


@torch.no_grad()
def _growth(x: Tensor, y: Tensor) -> Tensor:
    y = y.to(x.device)
    size = (y.double() - x.double()).norm() / x.double().norm().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.stack([update_exponent(x, y), size])


def _together(scalars: list[Tensor]) -> Tensor:
    """Stack tensors of one shape, which may lie on several devices, on the first one's device."""
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars])


def _describe(state: Tensor) -> str:
    return f"a {str(state.dtype).removeprefix('torch.')} tensor of shape {tuple(state.shape)}"
