"""View of an optimizer whose learning rates are scaled, for the time of one update.

The step pre-hook passes the view to `step()` instead of the optimizer. The optimizer's own parameter groups always
hold the user's rates. Checkpoints, schedulers, signal handlers and hooks therefore never read a scaled value, also
after a step that raised.
"""

from __future__ import annotations

import sys
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

RATE = "lr"

_view_classes: weakref.WeakKeyDictionary[type[Optimizer], type[Optimizer]] = weakref.WeakKeyDictionary()


def scaled_view(
    optimizer: Optimizer, scale: float, *, sets_rate: bool = False, factors: Sequence[float] = ()
) -> Optimizer:
    """Return a view of `optimizer` with all its attributes, whose groups multiply the user's rate by `scale` in (0, 1].

    The step may write to the view and to its groups: the optimizer has every change at once. A rate that it writes
    loses the scale again, because the step derived it from the scaled one. With `sets_rate` the step computes the rate
    from something else: the value that it writes is the user's own.
    Each of `factors` multiplies the scale of one of the first groups.
    """
    kind = type(optimizer)
    view_class = _view_classes.get(kind)
    if view_class is None:
        view_class = _view_classes[kind] = _make_view_class(kind)
    view: Any = object.__new__(view_class)
    view.__dict__ = optimizer.__dict__
    own = zip(optimizer.param_groups, chain(factors, repeat(1.0)), strict=False)
    groups = [ScaledGroup(each, scale * factor, sets_rate) for each, factor in own]
    for name, value in (("_optimizer", optimizer), ("_scaled_groups", groups), ("_known", tuple(groups))):
        object.__setattr__(view, name, value)
    object.__setattr__(view, "_make_group", partial(ScaledGroup, scale=scale, sets_rate=sets_rate))
    return view  # type: ignore[no-any-return]


def is_view(optimizer: Optimizer) -> bool:
    """Return True for a view: torch gives it to the hooks of all optimizers if a step calls that of its parent."""
    return issubclass(type(optimizer), _Unregistered)


class _Unregistered:
    """First base of each view class: an optimizer's class may keep a register of its subclasses."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


TABLES = {
    "_optimizer_step_pre_hooks": "_global_optimizer_pre_hooks",
    "_optimizer_step_post_hooks": "_global_optimizer_post_hooks",
}
"""The attributes with the hooks of one optimizer, each with the name of the hooks of all optimizers in torch."""


class StepHooks(UserDict[int, Any]):
    """The hooks of the optimizer `own` for a call of the parent's step by that of `stand_in`, its view or its copy.

    torch iterates over them, behind or before the hooks of all optimizers. `wrap` makes of each hook the one to call.
    """

    def __init__(self, name: str, own: Any, stand_in: Optimizer, wrap: Callable[[Any], Callable[..., Any]]) -> None:
        self.data = own
        self._wrap = wrap
        self._attributes = id(vars(stand_in))
        self._all: dict[int, Any] = vars(sys.modules[Optimizer.__module__])[TABLES[name]]
        self._come_first = name == "_optimizer_step_post_hooks"

    def __getitem__(self, key: int) -> Any:
        return self._wrap(self.data[key])

    def values(self) -> Any:
        """Return the hooks. Those of all optimizers are wrapped for their next call, and whole again after it."""
        if self._come_first:
            return self._and_all()
        self._wrap_all()
        return super().values()

    def _and_all(self) -> Iterator[Any]:
        yield from super().values()
        self._wrap_all()

    def _wrap_all(self) -> None:
        hooks = self._all
        before = {key: hook for key, hook in hooks.items() if not _is_ours(hook)}

        def once(key: int) -> Callable[..., Any]:
            def call(stepping: Optimizer, *args: Any) -> Any:
                if id(vars(stepping)) != self._attributes:
                    return before[key](stepping, *args)  # a step in another thread
                hooks[key] = before[key]
                try:
                    return self._wrap(before[key])(stepping, *args)
                except BaseException:
                    hooks.update({each: hook for each, hook in before.items() if each in hooks})
                    raise

            return call

        hooks.update({key: once(key) for key in before})


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("koopmon.")


def _of_optimizer(view: Any, hook: Any) -> Callable[..., Any]:
    """Return `hook` for a call with `view`: it gets the optimizer. One of koopmon's gets the arguments as they are."""
    optimizer = view._optimizer
    if _is_ours(hook):
        return lambda _, *arguments: hook(optimizer, *arguments)

    def call(_: Optimizer, args: Any, kwargs: Any) -> Any:
        result = hook(optimizer, (optimizer, *args[1:]), kwargs)
        if isinstance(result, tuple) and len(result) == 2 and result[0] and result[0][0] is optimizer:
            return (view, *result[0][1:]), result[1]
        return result

    return call


def _hooks_property(name: str) -> property:
    def hooks(view: Any) -> StepHooks:
        own = getattr(view._optimizer, name)
        return own if isinstance(own, StepHooks) else StepHooks(name, own, view, partial(_of_optimizer, view))

    return property(hooks)


def _make_view_class(kind: type[Optimizer]) -> type[Optimizer]:
    names: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__slots__": ("_known", "_make_group", "_optimizer", "_scaled_groups"),
        "__class__": property(lambda view: kind),  # for `super(self.__class__, self)`
        "param_groups": _GROUPS,
        # What outlives the update, or runs code of the user's, has the optimizer itself.
        "state_dict": lambda view, *args, **kwargs: view._optimizer.state_dict(*args, **kwargs),
        "__reduce_ex__": lambda view, protocol: view._optimizer.__reduce_ex__(protocol),
    }
    for hooks in TABLES:
        names[hooks] = _hooks_property(hooks)
    # Without the metaclass' own constructor, which may keep a register too.
    metaclass: Any = type(kind)
    return type.__new__(metaclass, kind.__name__, (_Unregistered, kind), names)  # type: ignore[no-any-return]


def close_view(view: Optimizer, optimizer: Optimizer) -> None:
    """Give `optimizer` the last changes of its view: rates written in place, and groups added, replaced or removed."""
    known = view._known  # type: ignore[attr-defined]
    groups = [_scaled_group(view, each) for each in view.param_groups]
    for each in groups:
        each.settle()
    own = [each._group for each in groups]
    before = [each._group for each in known]
    if list(map(id, own)) != list(map(id, before)):
        seen = set(map(id, own + before))
        optimizer.param_groups[:] = own + [each for each in optimizer.param_groups if id(each) not in seen]
    for each in groups:
        each.end()


def _set_groups(view: Any, groups: list[Any]) -> None:
    view._scaled_groups = [_scaled_group(view, each) for each in groups]


def _scaled_group(view: Any, group: dict[str, Any]) -> ScaledGroup:
    """Return a group that the step has put into the view as a scaled one. A copy of a scaled one has its rate back."""
    if isinstance(group, ScaledGroup):
        return group
    for each in view._known:
        if each._group is group:
            return each  # type: ignore[no-any-return]
    parameters = set(map(id, group["params"]))
    for each in view._known:
        if not parameters.isdisjoint(map(id, each._group["params"])) and each.gave(group.get(RATE)):
            group[RATE] = each._group[RATE]
            break
    return view._make_group(group)  # type: ignore[no-any-return]


_GROUPS = property(lambda view: view._scaled_groups, _set_groups)


# Both: the methods of a mapping, which all use the few below, and a dict for isinstance().
_MappingDict: Any = type("_MappingDict", (MutableMapping, dict), {"__slots__": ()})


class ScaledGroup(_MappingDict):  # type: ignore[misc]
    """One parameter group, whose rate is read as the user's rate times the scale. All writes reach the group itself.

    The content of the dict itself is the same, for code that reads it without these methods.
    """

    __slots__ = ("_copy", "_group", "_scale", "_sets_rate", "_version")

    def __init__(self, group: dict[str, Any], scale: float, sets_rate: bool) -> None:
        self._group, self._scale, self._sets_rate = group, scale, sets_rate
        self._copy: Tensor | None = None
        for key in group:
            dict.__setitem__(self, key, self[key])

    def __getitem__(self, key: str) -> Any:
        value = self._group[key]
        return self._scaled(value) if key == RATE else value

    def __setitem__(self, key: str, value: Any) -> None:
        if key != RATE:
            self._group[key] = value
        elif value is self._copy and value is not None:
            self.settle()  # written in place, then stored
        else:
            self._group[key] = self._unscaled(value)
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: str) -> None:
        del self._group[key]
        dict.pop(self, key, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self._group),)

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def gave(self, rate: Any) -> bool:
        """Return True if `rate` is the scaled rate as this group gives it to its readers."""
        own = self._group.get(RATE)
        if isinstance(own, Tensor) and not own.requires_grad:
            return rate is not None and rate is self._copy
        return number(own) is not None and number(rate) == number(times(own, self._scale))

    def _scaled(self, rate: Any) -> Any:
        if not isinstance(rate, Tensor) or rate.requires_grad:
            return times(rate, self._scale)
        self.settle()
        return self._scaled_copy(rate)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _scaled_copy(self, rate: Tensor) -> Tensor:
        if self._copy is None:
            self._copy = torch.empty_like(rate)
        # In place, and without reading the value: the rate may be on a device.
        self._copy.copy_(rate).mul_(self._scale)
        self._version = self._copy._version
        return self._copy

    def _unscaled(self, written: Any) -> Any:
        own = self._group.get(RATE)
        if self._sets_rate:
            return written
        try:
            if isinstance(written, Tensor) or isinstance(own, Tensor) or not own:
                return written / self._scale
            return own * (written / (own * self._scale))  # exactly `own` if the step wrote back what it read
        except TypeError:
            return written

    def end(self) -> None:
        """Give the user's rate from now on: a view that has ended is still among the arguments of later hooks."""
        self._scale, self._copy = 1.0, None
        for key in self._group:
            dict.__setitem__(self, key, self._group[key])

    @torch.no_grad()
    def settle(self) -> None:
        """Give the group a change that the step made in place to the tensor of the scaled rate."""
        rate = self._group.get(RATE)
        if self._copy is not None and self._copy._version != self._version and isinstance(rate, Tensor):
            rate.copy_(self._copy if self._sets_rate else self._copy / self._scale)
            self._version = self._copy._version


def times(rate: Any, scale: float) -> Any:
    """Return the rate times `scale`, for any kind of number; other values, such as None, unchanged."""
    try:
        return rate * scale
    except TypeError:
        return rate


def number(rate: Any) -> float | None:
    """Return a rate in host memory as a number; None if it is no number."""
    try:
        return None if rate is None or isinstance(rate, str) else float(rate)
    except (TypeError, ValueError):
        return None
