"""Module hooks that stay out of the user's files and copies.

A hook in a module's own tables would travel with `torch.save`, `copy.deepcopy` and `torch.jit.script`. A reducer for
the module's class, in `copyreg`, removes it from pickles and copies. TorchScript is given the modules without it.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from koopmon.agent.circuit_breaker import GuardedHook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
"""Tables of a module: its hooks by id, and their options by the same ids."""


class HiddenHook:
    """One hook in `module`. While it is paused, the module is as without it."""

    def __init__(self, module: nn.Module, table: str, handle: RemovableHandle, hook: GuardedHook) -> None:
        self.module = module
        self._hook = hook
        self._table, self._options = table, f"{table}_with_kwargs"
        self._handle = handle
        self._with_kwargs = handle.id in vars(module)[self._options]
        self._paused: dict[str, Any] = {}
        """Values taken out of the module's tables, by the table."""

    def pause(self) -> None:
        """Take the hook out, unless the module has hooks of others: then it would gain nothing."""
        tables = vars(self.module)
        if all(isinstance(each, GuardedHook) for each in tables[self._table].values()):
            for name in (self._table, self._options):
                if self._handle.id in tables[name]:
                    self._paused[name] = tables[name].pop(self._handle.id)

    def resume(self) -> None:
        """Put a paused hook back, in front of the hooks that came since."""
        while self._paused:
            name, value = self._paused.popitem()
            table = vars(self.module)[name]
            table[self._handle.id] = value
            table.move_to_end(self._handle.id, last=False)

    @property
    def is_gone(self) -> bool:
        """True if others have removed the hook, as by `module._forward_hooks.clear()`."""
        return not self._paused and self._handle.id not in vars(self.module)[self._table]

    def restore(self) -> None:
        """Put a hook back that others have removed."""
        tables = vars(self.module)
        tables[self._table][self._handle.id] = self._hook
        if self._with_kwargs:
            tables[self._options][self._handle.id] = True

    def remove(self) -> None:
        """Remove the hook. Idempotent."""
        self._paused.clear()
        self._handle.remove()
        for name in (self._table, self._options):  # the module may have other tables than at first
            vars(self.module)[name].pop(self._handle.id, None)


def add_pre_hook(module: nn.Module, hook: GuardedHook) -> HiddenHook:
    """Call hook(module, args, kwargs) before each call of `module`."""
    _hide_hooks_of(type(module))
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    return HiddenHook(module, "_forward_pre_hooks", handle, hook)


def add_hook(module: nn.Module, hook: GuardedHook, *, with_kwargs: bool = False) -> HiddenHook:
    """Call hook(module, args, output) after each call of `module`; hook(module, args, kwargs, output) with kwargs."""
    _hide_hooks_of(type(module))
    handle = module.register_forward_hook(hook, with_kwargs=with_kwargs)
    return HiddenHook(module, "_forward_hooks", handle, hook)


def restore(hooks: Iterable[HiddenHook]) -> bool:
    """Put those of `hooks` back that others have removed. Returns True if there were any."""
    gone = [hook for hook in hooks if hook.is_gone]
    for hook in gone:
        hook.restore()
    return bool(gone)


def _hide_hooks_of(kind: type[nn.Module]) -> None:
    copyreg.dispatch_table.setdefault(kind, _reduce)  # a reducer of the user's own stays
    recursive = torch.jit._recursive
    create = getattr(recursive, "create_script_module", None)
    if create is None or hasattr(create, "koopmon_hides_hooks"):
        return

    @functools.wraps(create)
    def create_script_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _without_hooks(module):
            return create(module, *args, **kwargs)

    create_script_module.koopmon_hides_hooks = True  # type: ignore[attr-defined]
    recursive.create_script_module = create_script_module  # type: ignore[assignment]


def _reduce(module: nn.Module) -> Any:
    """Return what pickle and copy need to rebuild `module`, without koopmon's hooks."""
    reduced = module.__reduce_ex__(4)
    if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    hidden = _ids(reduced[2])
    if not hidden:
        return reduced
    state = {
        name: _left(value, hidden) if name in (*_HOOKS, *_OPTIONS) else value for name, value in reduced[2].items()
    }
    return (*reduced[:2], state, *reduced[3:])


def _ids(state: dict[str, Any]) -> set[int]:
    tables = (state.get(name) or {} for name in _HOOKS)
    return {key for table in tables for key, hook in table.items() if isinstance(hook, GuardedHook)}


def _left(table: Any, hidden: set[int]) -> Any:
    return type(table)((key, value) for key, value in table.items() if key not in hidden)


@contextmanager
def _without_hooks(root: nn.Module) -> Iterator[None]:
    """Take koopmon's hooks out of every module of `root`. They are back, in their places, at the end."""
    taken: list[tuple[dict[int, Any], list[tuple[int, Any]]]] = []
    try:
        for module in root.modules():
            state = vars(module)
            if hidden := _ids(state):
                for table in (state[name] for name in _HOOKS):
                    taken.append((table, list(table.items())))
                    for key in hidden.intersection(table):
                        del table[key]
        yield
    finally:
        for table, items in taken:
            table.clear()
            table.update(items)
