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

_WRAPPERS = {each for each in Optimizer.profile_hook_step.__code__.co_consts if isinstance(each, CodeType)}
"""Code of torch's wrapper of `step()`, which calls the hooks."""


def is_nested(optimizer: Optimizer) -> bool:
    """Return True if the `step()` that calls this hook was called by a `step()` of the same optimizer.

    A subclass calls that of its parent. Both call the hooks if an optimizer of the parent's class exists. A counter
    would be wrong after a step that raised: the frames are not.
    """
    if sum(hasattr(vars(kind).get("step"), "hooked") for kind in type(optimizer).__mro__) < 2:
        return False
    return sum(vars(each) is vars(optimizer) for each in _stepping()) > 1


def _stepping() -> Iterator[Optimizer]:
    """Yield the optimizers whose `step()` is running in this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _WRAPPERS:
            yield frame.f_locals["self"]
        frame = frame.f_back


def _has_closure(args: Any, kwargs: Any) -> bool:
    return callable(kwargs.get("closure")) or (len(args) > 1 and callable(args[1]))


@dataclass(slots=True)
class _Calls:
    """The last calls of one optimizer: in step number `step`, and the gradient of one parameter after them."""

    step: int = 0
    ended: bool = False
    """False until a call has returned in that step."""
    parameter: weakref.ref[Tensor] | None = None
    gradient: weakref.ref[Tensor] | None = None
    version: int = 0

    def note(self, optimizer: Optimizer) -> None:
        """Keep the gradient of this moment."""
        gradient = self._find(optimizer)
        self.gradient = None if gradient is None else weakref.ref(gradient)
        self.version = 0 if gradient is None else _version(gradient)

    def has_new_gradient(self, optimizer: Optimizer) -> bool:
        """Return True if a backward pass has written gradients since `note`."""
        gradient = self._find(optimizer)
        if gradient is None:
            return False
        return self.gradient is None or self.gradient() is not gradient or self.version != _version(gradient)

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
        self._forward = True
        """True if a training forward has begun since the last step began."""
        self._number = 0
        """Steps that have begun, with those whose calls all raised."""
        self._calls: weakref.WeakKeyDictionary[Optimizer, _Calls] = weakref.WeakKeyDictionary()
        self._expected: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    @property
    def open(self) -> bool:
        """True while a step has begun and not ended. A step whose calls all raised is none."""
        return self._begun and bool(self._in_step())

    def begins_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> bool:
        """Return True if the call `optimizer.step(*args[1:], **kwargs)` belongs to another step than the calls before.

        A closure contains a backward pass of its own.
        """
        if self._forward or _has_closure(args, kwargs):
            return True
        calls = self._calls.get(optimizer)
        took_part = calls is not None and calls.step == self._number and calls.ended
        return took_part and calls.has_new_gradient(optimizer)  # type: ignore[union-attr]

    def begin_step(self, optimizers: Iterable[Optimizer]) -> None:
        """Begin a step. Those of `optimizers` are expected that took part in the last one."""
        live = set(optimizers)
        expected = live & self._in_step() or {each for each in live if _parameter(each) is not None}
        self._expected = weakref.WeakSet(expected)
        self._number += 1
        self._forward, self._begun = False, True

    def begin(self, optimizer: Optimizer) -> None:
        """Begin a call of `optimizer`."""
        calls = self._calls.setdefault(optimizer, _Calls())
        if calls.step < self._number:
            calls.step, calls.ended = self._number, False

    def end(self, optimizer: Optimizer) -> bool:
        """End a call of `optimizer`. Returns True if the step is complete."""
        calls = self._calls.setdefault(optimizer, _Calls())
        calls.note(optimizer)
        calls.ended = True
        # The rest of a backward pass may still read the weights.
        return self._begun and torch._C._current_graph_task_id() == -1 and self._in_step().issuperset(self._expected)

    def end_step(self) -> None:
        """End the step that is open."""
        self._begun = False
        self.num_steps += 1

    def on_forward(self) -> bool:
        """Note that a training forward begins. Returns True if an open step must end before it."""
        if self._unended() and next(_stepping(), None) is not None:
            return False  # inside a closure
        self._forward = True
        return self.open

    def _in_step(self) -> set[Optimizer]:
        """Return the optimizers of which a call has returned in the last step that began."""
        return {each for each, calls in self._calls.items() if calls.step == self._number and calls.ended}

    def _unended(self) -> bool:
        return any(calls.step == self._number and not calls.ended for calls in self._calls.values())


def _parameter(optimizer: Optimizer) -> Tensor | None:
    """Return the first parameter that has a gradient."""
    return next((each for group in optimizer.param_groups for each in group["params"] if each.grad is not None), None)


def _version(gradient: Tensor) -> int:
    return 0 if gradient.is_inference() else gradient._version
