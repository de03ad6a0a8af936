"""The loss of one optimizer step, from the scalars that the loop calls `backward()` on.

The loss of a step is the sum of these scalars: the gradient of that sum is the one that the optimizer uses. Losses that
the loop divides by its number of micro-batches therefore add up to their mean, and several losses of a step to their
total.

No function of torch is replaced. A documented pre-hook on the gradient accumulators of a few parameters shows a
backward pass that reaches the model. The call stack has the scalar. A pass of another model, `torch.autograd.grad` and
a backward pass inside a node of the graph show none.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from koopmon.agent.capture.hidden_hooks import add_hook
from koopmon.agent.capture.scalar import Scalar, added, divided
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.stats import AgentStats
from koopmon.no_gradients import without_gradients

NUM_PARAMETERS = 8
"""Parameters whose gradient accumulators have a hook. Several, because a step may leave out some of them."""
MAX_OUTPUTS = 16
"""Tensors in the output of a sharded model that have a hook."""

_BACKWARD = inspect.unwrap(torch.autograd.backward).__code__
_GRAD = inspect.unwrap(torch.autograd.grad).__code__
_NODE = BackwardCFunction.apply.__code__


class BackwardLoss:
    """Adds up the scalars of the backward passes that reach a model, between `begin` and `end`.

    Values on an accelerator stay there: nothing waits for them.
    """

    def __init__(self, breaker: CircuitBreaker, stats: AgentStats) -> None:
        self._breaker = breaker
        self._stats = stats
        # The accumulators are owned here, and must not own this object: a model that is dropped has to be freed.
        self._last_task = _LastTask()
        self._hook = breaker.hook(_once_per_task(_weakly(self._on_gradient), self._last_task))
        self._ended = breaker.hook(_weakly(self._on_backward_end))
        self._handles: list[Any] = []
        self._nodes: list[Any] = []
        self._parameters: list[Tensor] = []
        self._listens = False
        self._root_handle: Any = None
        self._last_root: Callable[[], Tensor | None] = lambda: None
        self._filled: list[Tensor] = []
        """Those of the parameters that held a gradient at the end of the last backward pass."""
        self._pending: Scalar | None = None
        """Sum of the scalars since the last `unscale`."""
        self._sum: Scalar | None = None
        self.maybe_scaled = False
        """True if a scalar of this step is a product, as one that a GradScaler has scaled."""

    def begin(
        self, parameters: Iterable[Tensor], sharded: nn.Module | None = None, *, in_threads: bool = False
    ) -> None:
        """Listen to the backward passes of the step that begins.

        `sharded` is the model if its wrapper hides the parameters from the graph: its output then has the hook. With
        forwards `in_threads` on the CPU the loss stays unknown: a node that is made here counts as one before all later
        nodes of this thread, and these counts decide the order in which the gradients of several threads are added.
        """
        self._clear()
        if _compiles_backward():
            return
        leaves = [each for each in parameters if each.requires_grad and each.is_leaf]
        if in_threads and sharded is None and all(each.device.type == "cpu" for each in leaves):
            return
        self._listens, self._parameters = True, _spread(leaves)
        if sharded is not None:
            if self._root_handle is None:
                self._root_handle = add_hook(sharded, self._breaker.hook(_weakly(self._on_output)))
            return
        self._nodes = _accumulators(self._parameters)  # only a graph and this list keep them alive
        self._handles = [node.register_prehook(self._hook) for node in self._nodes]

    @without_gradients
    def unscale(self, scale: Tensor | None) -> None:
        """Divide the scalars since the last call by `scale`, the GradScaler's; None for no scale."""
        if (pending := self._pending) is not None:
            self._pending = None
            self._sum = added(self._sum, divided(pending, scale))

    def end(self) -> Scalar | None:
        """Return the loss of the step; None if no backward pass was seen."""
        self.unscale(None)
        loss = self._sum
        self._clear()
        return loss

    def close(self) -> None:
        """Remove every hook. Idempotent."""
        self._clear()
        if self._root_handle is not None:
            self._root_handle.remove()
            self._root_handle = None

    def _clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._nodes, self._parameters, self._filled = [], [], [], []
        self._listens = self.maybe_scaled = False
        self._last_root, self._last_task.number = (lambda: None), -1
        self._pending = self._sum = None

    # Hooks.

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._listens and torch.is_grad_enabled():
            functions = dict.fromkeys(each.grad_fn for each in _tensors(output) if each.grad_fn is not None)
            for function in list(functions)[:MAX_OUTPUTS]:
                self._handles.append(function.register_prehook(self._hook))

    def _on_gradient(self, gradients: Sequence[Tensor | None]) -> None:
        if not self._listens:
            return
        started = time.perf_counter()
        self._note(backward_roots())
        self._stats.capture_seconds += time.perf_counter() - started

    @without_gradients
    def _note(self, roots: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Add the scalars of a backward pass."""
        # One backward pass may run several tasks, as a reentrant checkpoint does.
        if not roots or self._last_root() is roots[0][0]:
            return
        value = _total(roots)
        if value is None:
            return
        self._last_root = weakref.ref(roots[0][0])
        self.maybe_scaled = self.maybe_scaled or any(_is_product(root) for root, _ in roots)
        if self._filled and all(each.grad is None for each in self._filled):
            # The loop has cleared the gradients since the last backward pass: the optimizer does not use that one.
            self._pending = self._sum = None
        self._pending = added(self._pending, value)
        torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _on_backward_end(self) -> None:
        # Some frameworks take the gradients out of the parameters during the backward pass. They have none here.
        self._filled = [each for each in self._parameters if each.grad is not None]


def backward_roots() -> list[tuple[Tensor, Tensor | None]]:
    """Return the tensors of the `backward()` call in progress, each with its gradient argument; empty for none.

    Call it from a hook of the graph. Hooks of tensors on a GPU run in a thread of the device: the call is then on the
    stack of the thread that waits for it. With several such threads the result is empty.
    """
    call = _call(sys._getframe(1))
    if call is None:
        calls = [found for frame in sys._current_frames().values() if (found := _call(frame)) is not None]
        call = calls[0] if len(calls) == 1 else None
    if call is None or call.f_code is not _BACKWARD:
        return []
    known = call.f_locals
    tensors, gradients = known.get("tensors"), known.get("grad_tensors")
    roots: list[Any] = list(tensors) if isinstance(tensors, (tuple, list)) else [tensors]
    weights: list[Any] = list(gradients) if isinstance(gradients, (tuple, list)) else [gradients] * len(roots)
    if len(weights) != len(roots) or not all(isinstance(each, Tensor) for each in roots):
        return []
    return list(zip(roots, weights, strict=True))


def _call(frame: FrameType | None) -> FrameType | None:
    """Return the outermost frame of `backward` or `grad` on a stack, without those inside a node of a graph."""
    found: FrameType | None = None
    while frame is not None:
        if frame.f_code is _NODE:
            found = None
        elif frame.f_code is _BACKWARD or frame.f_code is _GRAD:
            found = frame
        frame = frame.f_back
    return found


def _total(roots: Sequence[tuple[Tensor, Tensor | None]]) -> Scalar | None:
    """Return the sum of scalar roots, each times its gradient argument; None if they are no losses."""
    total: Scalar | None = None
    for root, weight in roots:
        value, factor = _scalar(root), None if weight is None else _scalar(weight)
        if value is None or (weight is not None and factor is None):
            return None
        total = added(total, value if factor is None else value * factor)
    return total


def _scalar(tensor: Tensor) -> Scalar | None:
    """Return a copy of a real scalar, which the loop may change; None for another tensor."""
    local: Any = tensor
    if type(tensor) is not Tensor and hasattr(tensor, "to_local"):
        local = tensor.detach()
        if not all(each.is_replicate() for each in local.placements):
            return None
        local = local.to_local()
    if local.numel() != 1 or local.is_complex() or _is_captured(local):
        return None
    if local.is_cpu:
        return float(local.item())
    copy: Tensor = local.detach().reshape(()).to(torch.float32, copy=True)
    return copy


def _is_captured(tensor: Tensor) -> bool:
    """Return True while a CUDA graph records the work: every replay would repeat it."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_product(root: Tensor) -> bool:
    return root.grad_fn is not None and root.grad_fn.name().startswith("Mul")


def _accumulators(parameters: Iterable[Tensor]) -> list[Any]:
    """Return the gradient accumulators of leaves."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():  # a loop may step in such a mode
        with torch.inference_mode(False), torch.enable_grad():
            return _accumulators(parameters)
    # As torch.autograd.graph.get_gradient_edge, whose guards take longer than all else.
    functions: list[Any] = [each.view_as(each).grad_fn for each in parameters]
    return [function.next_functions[0][0] for function in functions]


def _spread(parameters: list[Tensor]) -> list[Tensor]:
    """Return the smallest parameter of each of NUM_PARAMETERS parts of the model."""
    size = max(1, math.ceil(len(parameters) / NUM_PARAMETERS))
    return [min(parameters[start : start + size], key=Tensor.numel) for start in range(0, len(parameters), size)]


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in the output of a model: nested tuples, lists and mappings."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _tensors(each)
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)


def _compiles_backward() -> bool:
    """Return True if torch compiles backward passes: a hook would be a part of the graph."""
    config = sys.modules.get("torch._dynamo.config")
    return bool(getattr(config, "compiled_autograd", False))


class _LastTask:
    """The number of the last task of the autograd engine that was seen."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = -1


def _once_per_task(hook: Callable[..., None], last: _LastTask) -> Callable[..., None]:
    """Return a function that calls `hook` for the first of the accumulators that a task of the engine reaches."""
    current = torch._C._current_graph_task_id

    def call(gradients: Sequence[Tensor | None]) -> None:
        task = current()
        if task != last.number:
            last.number = task
            hook(gradients)

    call.__name__ = hook.__name__
    return call


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls the bound `method` while its object exists."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        if (alive := reference()) is not None:
            alive(*args)

    call.__name__ = method.__name__
    return call
