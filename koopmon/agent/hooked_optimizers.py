"""The optimizers of one training, with the hooks on their steps."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from koopmon.agent.circuit_breaker import GuardedHook
from koopmon.agent.control.optimizer_set import OptimizerSet, parameter_ids
from koopmon.agent.control.step_clock import may_be_nested, stepping_optimizers

Hook = Callable[..., Any]


class HookedOptimizers:
    """The optimizers that update a model, each with the hooks `before` and `after` on its step.

    `members` holds them weakly. `before` is called after the pre-hooks of others, which then see the user's rates.
    """

    def __init__(self, model: nn.Module, members: OptimizerSet, before: Hook, after: Hook) -> None:
        self.members = members
        self.changed = False
        """True if some were added since `find_wrappers`."""
        self._model = weakref.ref(model)
        self._before = before
        self._after = after
        self._handles: weakref.WeakKeyDictionary[Optimizer, tuple[Any, Any]] = weakref.WeakKeyDictionary()
        self._num_foreign_groups: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        """The number of groups of each optimizer that updates other models only."""
        self._keys: set[int] = set()
        """The keys of `before` among the pre-hooks of the optimizers."""
        self._wrappers: set[int] = set()
        """The ids of optimizers with hooks that wrap others."""

    def add(self, optimizer: Optimizer) -> None:
        """Follow one more optimizer, or those that it wraps."""
        self.changed = True
        for member in self.members.add(optimizer):
            self._wrappers.discard(id(member))
            self.hook(member)

    def hook(self, member: Optimizer) -> None:
        """Put the hooks on a member that has none, or whose hooks the user has removed."""
        handles = member.register_step_pre_hook(self._before), member.register_step_post_hook(self._after)
        self._keys.add(handles[0].id)
        self._handles[member] = handles

    def remove(self) -> None:
        """Remove all hooks. Idempotent."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()

    def find_wrappers(self) -> None:
        """Replace the optimizers that wrap others. In their constructors, which add them, they do not hold these."""
        before = list(self.members)
        for each in before:
            self.add(each)
        self._wrappers |= set(map(id, before)) - set(map(id, self.members))
        self.changed = False

    def is_wrapper(self, optimizer: Optimizer) -> bool:
        """Return True if the optimizers that it holds are followed in place of it."""
        return id(optimizer) in self._wrappers

    def is_only(self, optimizer: Optimizer) -> bool:
        """Return True if `optimizer` alone updates the model, and its step calls no other one."""
        alone = not self.changed and list(self.members) == [optimizer] and not self.is_wrapper(optimizer)
        return alone and not may_be_nested(optimizer)

    def has_hooks(self, optimizer: Optimizer) -> bool:
        """Return True if `optimizer` is followed, and its hooks are in place."""
        handles = self._handles.get(optimizer)
        return handles is not None and (
            handles[0].id in optimizer._optimizer_step_pre_hooks
            and handles[1].id in optimizer._optimizer_step_post_hooks
        )

    def is_foreign(self, optimizer: Optimizer) -> bool:
        """Return True if `optimizer` updates other models only."""
        num_groups = len(optimizer.param_groups)
        if self._num_foreign_groups.get(optimizer) == num_groups:
            return True
        model = self._model()
        foreign = model is None or parameter_ids(optimizer).isdisjoint(map(id, model.parameters()))
        if foreign:
            self._num_foreign_groups[optimizer] = num_groups
        return foreign

    def take_over(self, optimizer: Optimizer) -> str:
        """Follow `optimizer`, which has stepped, if it updates the model and is not followed, or has lost its hooks.

        Its next step is the first one that is followed. Returns what has happened; empty if it is left alone.
        """
        model = self._model()
        if model is None or self.has_hooks(optimizer) or next(stepping_optimizers(), optimizer) is not optimizer:
            return ""
        if optimizer in self._handles:
            self.hook(optimizer)
            return "the hooks of the optimizer are gone"
        if parameter_ids(optimizer).isdisjoint(map(id, model.parameters())):
            return ""
        self.add(optimizer)
        return "another optimizer updates the model"

    def come_last(self, optimizer: Optimizer) -> None:
        """Let `before` be called after the pre-hooks of others that came later: these must not get a view."""
        hooks: OrderedDict[int, Any] = optimizer._optimizer_step_pre_hooks  # type: ignore[assignment]
        for key in reversed(hooks):
            if key in self._keys:
                return
            if not isinstance(hooks[key], GuardedHook):
                break
        for key in self._keys & hooks.keys():
            hooks.move_to_end(key)
