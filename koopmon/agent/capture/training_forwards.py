"""The training forwards of a model: the hooks of the root, and the begin and the end of each forward.

A training forward runs with gradients and in training mode. A loop that trains in eval mode is known by its updates:
the parameters had gradients, and no forward in training mode came before. A forward begins at the root, or at the first
block where the loop bypasses the root.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import Any, Protocol

import torch
from torch import nn

from koopmon.agent.capture.block_hooks import compiles
from koopmon.agent.capture.forward_kind import recomputing
from koopmon.agent.capture.hidden_hooks import HiddenHook, add_hook, add_pre_hook, restore
from koopmon.agent.capture.tap_events import TapEvents
from koopmon.agent.circuit_breaker import CircuitBreaker, is_foreign
from koopmon.agent.parallelism import takes_uneven_inputs, wrappers

MAX_RESTED = 16
"""Forwards without a step after which the forwards are followed again."""


class ForwardEvents(Protocol):
    """Receiver of the begin and the end of forwards."""

    def hook_always(self) -> None:
        """Leave all hooks in place from now on: a compiler must find them."""

    def on_begin(self) -> None:
        """Handle the begin of a training forward."""

    def on_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Handle the call of the root, after the begin of its forward."""

    def on_end(self, *, complete: bool) -> None:
        """Handle the end of a forward; none may be open.

        If it is `complete`, the blocks behind the last one called were skipped. Otherwise the next forward begins.
        """


class TrainingForwards:
    """Follows the forwards of `model`. While it rests, its hook returns after a check of a few flags.

    `events` receives each forward. `listener` receives those that concern the steps.
    """

    def __init__(self, model: nn.Module, breaker: CircuitBreaker, events: ForwardEvents, listener: TapEvents) -> None:
        self.count = 0
        """Training forwards since the last step edge."""
        self.others: Counter[str] = Counter()
        """Forwards that were no training forwards, by their kind, since the last step edge."""
        self.in_root = False
        self.last_layer: int | None = None
        """The layer that was called last by a loop that bypasses the root; None after a step edge."""
        self.trains_in_eval = False
        self.resting = False
        """True in steps without work, whose forwards are not followed."""
        self.always_hooked = False
        """True if the hooks of the root and the blocks stay in the steps without work for them."""
        self._has_ranks = False
        self._num_rested = 0
        """Forwards of the root since the last step edge, while resting."""
        self._root_trains: bool | None = None
        """The mode of a root that was called without gradients, until a block of it runs with some."""
        self._thread: int | None = None
        """The thread of the open forward or, while none is open, of the last training forward."""
        self._model = weakref.ref(model)
        self._breaker = breaker
        self._events = events
        self._listener = listener
        self._handles: list[HiddenHook] = []
        self._hook(model)

    def _hook(self, root: nn.Module) -> None:
        self._handles.append(add_pre_hook(root, self._breaker.hook(self._enter_root)))
        self._handles.append(add_hook(root, self._breaker.hook(self._leave_root)))

    def follow_wrapper(self) -> bool:
        """Hook the compiled wrapper of the model as well. Returns False if there is none."""
        model = self._model()
        found = () if model is None else wrappers(model, torch._dynamo.OptimizedModule)
        outer = [each for each in found if each is not model]
        for each in outer:
            self._hook(each)
        return bool(outer)

    def restore(self) -> bool:
        """Put hooks back that others have removed. Returns True if there were any."""
        return restore(self._handles)

    def remove(self) -> None:
        """Remove the hooks. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def rest(self, *, has_ranks: bool = False) -> None:
        """Follow no forward until work is due, unless a compiled graph must find the hooks.

        With several ranks the begin of DDP's `join()` is work.
        """
        self._has_ranks = has_ranks
        if not self.always_hooked and not self.resting and not compiles():
            self.resting, self._num_rested = True, 0
            self._handles[1].pause()  # the other one sees a compiler before that traces the forward

    def listen(self) -> None:
        """Follow the forwards again. Idempotent."""
        if self.resting:
            self.resting = False
            self._handles[1].resume()

    def start_step(self) -> None:
        """Count the forwards of a new step."""
        self.count, self._num_rested, self.in_root, self.last_layer = 0, 0, False, None
        self.others.clear()

    def is_elsewhere(self) -> bool:
        """Return True for a call beside the training, such as a validation in another thread.

        It is in another thread than the open forward. Without gradients, it is in another thread than the last training
        forward.
        """
        if self._thread is None or threading.get_ident() == self._thread:
            return False
        return self.in_root or not torch.is_grad_enabled()

    def begin(self, training: bool, gradients: bool) -> None:
        """Begin a forward with these modes, unless it is no training forward."""
        # The forward before this one may have raised: no hook has seen its end.
        self._events.on_end(complete=False)
        if not gradients or not self._handles:
            self.others["without gradients"] += 1
            return
        if not training and not self.trains_in_eval:
            self.others["in eval mode"] += 1
            return
        self.trains_in_eval = not training
        self._thread = threading.get_ident()
        self._listener.on_forward()  # may end the step before, which counts its forwards
        self._events.on_begin()
        self.count += 1

    def begin_inside(self) -> bool:
        """Begin a forward at the first call with gradients, if the root was called without them.

        Returns False if there is no such forward.
        """
        training = self._root_trains
        if training is None or not torch.is_grad_enabled() or recomputing() or self.is_elsewhere() or is_foreign():
            return False
        self._root_trains = None
        self.begin(training, True)
        return True

    def dismiss(self) -> None:
        """Leave a forward alone that has begun on tensors without values."""
        self.count -= 1
        self.others["transformed"] += 1

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.always_hooked and compiles():
            self._events.hook_always()
        if self.resting:
            self._num_rested += 1
            uneven = self._has_ranks and takes_uneven_inputs(module)
            if self._num_rested > MAX_RESTED or uneven:  # the optimizer may be another one, or step without its hooks
                self._listener.on_no_step()
            return
        gradients = torch.is_grad_enabled()
        # A training forward takes the place of a validation that is open in another thread.
        beside = self.is_elsewhere() and not (gradients and self._root_trains is not None)
        if recomputing() or beside:
            return
        if is_foreign():
            self.others["transformed"] += 1
            return
        self.begin(module.training, gradients)
        self._root_trains = None if gradients else module.training
        self.in_root, self._thread = True, threading.get_ident()
        self._events.on_root(module, args, kwargs)

    def _leave_root(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not recomputing() and not is_foreign() and not self.is_elsewhere():
            self.in_root = False
            self._events.on_end(complete=True)
            if torch.is_grad_enabled():
                self._listener.on_output(output)
