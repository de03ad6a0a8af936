"""Counts the steps of a training, whatever the number of optimizers and of their calls.

A step is one update of the weights that follows a backward pass. It may take several calls: one for each optimizer, or
several of one optimizer. It ends with the last optimizer that also took part in the step before, or at the latest with
the next training forward.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from koopmon.agent.control.optimizer_set import held_by

_WRAPPERS = {each for each in Optimizer.profile_hook_step.__code__.co_consts if isinstance(each, CodeType)}
"""Code of torch's wrapper of `step()`, which calls the hooks."""


def is_nested(optimizer: Optimizer) -> bool:
    """Return True if the `step()` that calls this hook was called by a `step()` of the same optimizer.

    A subclass calls that of its parent. Both call the hooks if an optimizer of the parent's class exists. A counter
    would be wrong after a step that raised: the frames are not.
    """
    if not may_be_nested(optimizer):
        return False  # without a search of the frames
    return sum(vars(each) is vars(optimizer) for each in stepping_optimizers()) > 1


def may_be_nested(optimizer: Optimizer) -> bool:
    """Return True if the `step()` of two classes of the optimizer call hooks, and one may call the other."""
    first: Any = None
    for kind in type(optimizer).__mro__:
        step = kind.__dict__.get("step")
        if step is not None and hasattr(step, "hooked"):
            body = getattr(step, "__wrapped__", step)
            if first is not None and body is not first:  # torch hooks an inherited step once for each class
                return True
            first = body
    return False


def stepping_optimizers() -> Iterator[Optimizer]:
    """Yield the optimizers whose `step()` is running in this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in _WRAPPERS:
            yield frame.f_locals["self"]
        frame = frame.f_back


def running_wrapper(optimizer: Optimizer) -> Optimizer | None:
    """Return the outermost optimizer around `optimizer` that has a method running in this thread; None without one.

    No hook shows those whose class skips the constructor of torch's.
    """
    found: Optimizer | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            outer, inner = frame.f_locals.get("self"), optimizer if found is None else found
            if isinstance(outer, Optimizer) and any(each is inner for each in held_by(outer)):
                found = outer
        frame = frame.f_back
    return found


def has_closure(args: Any, kwargs: Any) -> bool:
    """Return True if `step(*args[1:], **kwargs)` computes the gradients itself, by a closure."""
    return callable(kwargs.get("closure")) or (len(args) > 1 and callable(args[1]))


@dataclass(slots=True)
class Calls:
    """The last calls of one optimizer: in step number `step`, and the last gradient of one parameter after them."""

    optimizer: weakref.ref[Optimizer]
    expected: bool = False
    """True if the step that is open waits for a call of this optimizer."""
    step: int = 0
    ended: bool = False
    """False until a call has returned in that step."""
    parameter: weakref.ref[Tensor] | None = None
    gradient: weakref.ref[Tensor] | None = None
    version: int = 0

    def took_part(self, step: int) -> bool:
        """Return True if a call has returned in step number `step`."""
        return self.ended and self.step == step

    def note(self, optimizer: Optimizer) -> None:
        """Keep the gradient of this moment."""
        gradient = self._find(optimizer)
        if gradient is not None:
            self.gradient, self.version = weakref.ref(gradient), _version(gradient)

    def has_new_gradient(self, optimizer: Optimizer) -> bool:
        """Return True if a backward pass has written gradients since `note`."""
        gradient = self._find(optimizer)
        if gradient is None:
            return False
        return self.gradient is None or self.gradient() is not gradient or self.version != _version(gradient)

    def advance(self, optimizer: Optimizer) -> bool:
        """Note the gradient of this moment. Returns True if a backward pass has written it since the last note."""
        gradient = self._find(optimizer)
        if gradient is None:
            return False
        before, version = self.gradient, 0 if gradient.is_inference() else gradient._version
        if before is not None and self.version == version and before() is gradient:
            return False
        self.gradient, self.version = weakref.ref(gradient), version
        return True

    def _find(self, optimizer: Optimizer) -> Tensor | None:
        parameter = None if self.parameter is None else self.parameter()
        if parameter is None or parameter.grad is None:
            parameter = _parameter(optimizer)
            self.parameter = None if parameter is None else weakref.ref(parameter)
        return None if parameter is None else parameter.grad


class StepClock:
    """The steps of one training. Each call of an optimizer lies between `begin` and `end`."""

    def __init__(self) -> None:
        self.num_steps = 0
        """Steps that have ended."""
        self._begun = False
        """True while a step has begun and not ended."""
        self._forward = False
        """True if a training forward has begun since the last step began."""
        self._number = 0
        """Steps that have begun, with those whose calls all raised."""
        self._calls: dict[int, Calls] = {}
        """Keys are ids of optimizers."""

    @property
    def open(self) -> bool:
        """True while a step has begun and not ended. A step whose calls all raised is none."""
        return self._begun and any(calls.took_part(self._number) for calls in self._calls.values())

    def begins_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> bool:
        """Return True if the call `optimizer.step(*args[1:], **kwargs)` belongs to another step than the calls before.

        A closure contains a backward pass of its own. A call before the first forward has no gradient: some loops make
        one, which silences a warning of their scheduler.
        """
        if self._forward or has_closure(args, kwargs):
            return True
        if self._number == 0:
            return _parameter(optimizer) is not None
        calls = self.calls_of(optimizer)
        return calls.took_part(self._number) and calls.has_new_gradient(optimizer)

    def begin_step(self, optimizers: Iterable[Optimizer]) -> None:
        """Begin a step. It waits for the optimizers of the last one: for the first, for those that have gradients."""
        known = False
        for key, calls in list(self._calls.items()):
            calls.expected = calls.took_part(self._number)
            if calls.optimizer() is None:
                del self._calls[key]
            elif calls.expected:
                known = True
        if not known:
            for each in optimizers:
                self.calls_of(each).expected = _parameter(each) is not None
        self._number += 1
        self._forward, self._begun = False, True

    def begin(self, optimizer: Optimizer) -> None:
        """Begin a call of `optimizer`."""
        calls = self.calls_of(optimizer)
        if calls.step < self._number:
            calls.step, calls.ended = self._number, False

    def end(self, optimizer: Optimizer) -> bool:
        """End a call of `optimizer`. Returns True if the step is complete."""
        calls = self.calls_of(optimizer)
        calls.note(optimizer)
        calls.ended = True
        # The rest of a backward pass may still read the weights.
        in_backward = torch._C._current_graph_task_id() != -1
        return self._begun and not in_backward and not any(map(self._is_missing, self._calls.values()))

    def end_step(self) -> None:
        """End the step that is open."""
        self._begun = False
        self.num_steps += 1

    def on_forward(self) -> bool:
        """Note that a training forward begins. Returns True if an open step must end before it."""
        if not self._begun:
            self._forward = True
            return False
        running = any(calls.step == self._number and not calls.ended for calls in self._calls.values())
        if running and next(stepping_optimizers(), None) is not None:
            return False  # inside a closure
        self._forward = True
        return self.open

    def calls_of(self, optimizer: Optimizer) -> Calls:
        """Return the last calls of `optimizer`."""
        calls = self._calls.get(id(optimizer))
        if calls is None or calls.optimizer() is not optimizer:
            calls = self._calls[id(optimizer)] = Calls(weakref.ref(optimizer))
        return calls

    def _is_missing(self, calls: Calls) -> bool:
        return calls.expected and not calls.took_part(self._number) and calls.optimizer() is not None


def _parameter(optimizer: Optimizer) -> Tensor | None:
    """Return the first parameter that has a gradient."""
    return next((each for group in optimizer.param_groups for each in group["params"] if each.grad is not None), None)


def _version(gradient: Tensor) -> int:
    return 0 if gradient.is_inference() else gradient._version
